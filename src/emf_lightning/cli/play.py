"""`emf play`: a run, or an exported folder, as a local web page."""

from __future__ import annotations

from pathlib import Path

from emf_lightning.part_classes import trusted


def play(
    run: Path,
    checkpoint: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str | None = None,
) -> None:
    """Show a model as a local web page: a prompt at 1, 2, 4 and 30 steps of the same noise, the parent beside it.

    Under each image are its time and network evaluations. The parent is the model that the run started from, at 30
    steps with its own guidance scale. The page needs the package gradio: pip install 'emf_lightning[play]'.

    Args:
        run: its directory, runs/<name> for its newest version, one of its checkpoints, or an exported folder.
        checkpoint: which of its checkpoints; by default checkpoints/last.ckpt, with averaged weights if it has some.
        host: address at which the page is served; 0.0.0.0 lets other machines see it.
        port: of the page; by default the first free one from 7860.
        device: of all parts; by default cuda where there is one.
    """
    from emf_lightning.cli.played_run import run_model  # here, as the next: they load torch
    from emf_lightning.evaluation.devices import device_of
    from emf_lightning.exported_files import INDEX
    from emf_lightning.play import check_gradio, exported_model, page, serve

    check_gradio()
    device_of(device)
    if (run / INDEX).is_file():
        model = exported_model(run, device, trusted())
    else:
        model = run_model(run, checkpoint).to(device)
    serve(page(model), host, port)
