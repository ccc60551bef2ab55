"""``python -m emf_lightning``: the command line without its script."""

from emf_lightning.cli import main

if __name__ == "__main__":
    main()
