"""The code in an exported folder, by which stock ``DiffusionPipeline`` loads it with ``trust_remote_code=True``.

diffusers imports a pipeline's class from ``pipeline.py`` and a part's from a file in the part's folder. Both import
this package: a copy of its modules beside each model would not fit into diffusers' one file a class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf_lightning.exported_files import (
    CARRIED_PART,
    CARRIED_PIPELINE,
    EARLIER_PART,
    INDEX,
    INSTALLED_PART,
    INSTALLED_PIPELINE,
    KINDS,
)
from emf_lightning.files import read_json, to_json

INSTALL = "pip install emf_lightning"

_CODE = """\
\"\"\"diffusers loads this with trust_remote_code=True. The code of the model is in the package emf_lightning.\"\"\"

try:
    from emf_lightning.trusted_pipeline import {name}
except ModuleNotFoundError as error:
    if error.name != "emf_lightning":
        raise
    raise ImportError("This model needs the package emf_lightning, which is not installed: {install}") from None
"""


def carry_code(folder: Path) -> None:
    """Writes the code into a folder, and names it in its index; the index keeps no path of this machine."""
    index = read_json(folder / INDEX, "export the run again")
    index.pop("_name_or_path", None)
    index |= {"_class_name": CARRIED_PIPELINE} | dict.fromkeys(KINDS, CARRIED_PART)
    (folder / INDEX).write_text(to_json(index))
    _write(folder / f"{CARRIED_PIPELINE[0]}.py", "TrustedPipeline as EMFPipeline")
    for name in KINDS:
        _write(folder / name / f"{CARRIED_PART[0]}.py", "TrustedPart as PipelinePart")


def _write(file: Path, name: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(_CODE.format(name=name, install=INSTALL))


def as_installed(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder with this package's classes in place of the code that imports them."""
    classes = [(CARRIED_PIPELINE, INSTALLED_PIPELINE), (CARRIED_PART, INSTALLED_PART), (EARLIER_PART, INSTALLED_PART)]
    return {key: next((new for old, new in classes if value == old), value) for key, value in index.items()}
