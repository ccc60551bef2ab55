"""``python -m emf_lightning``: the command line without its script."""

import sys

from emf_lightning.cli import main

if __name__ == "__main__":
    sys.argv[0] = "emf"  # the name in help and messages
    main()
