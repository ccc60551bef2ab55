"""The JSON files of an exported folder, which a stranger may have written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from emf_lightning.earlier_exports import migrate_part
from emf_lightning.files import read_json
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.part_classes import FLAG, builder
from emf_lightning.text.base import TextEncoder

INDEX = "model_index.json"
PART = "part.json"
HERE = "."

_PIPELINE = "EMFPipeline"
_OURS = ["emf_lightning.pipeline", "PipelinePart"]
_KINDS: dict[str, type] = {"transformer": FlowMapNetwork, "vae": Autoencoder, "text_encoder": TextEncoder}
PARTS = tuple(_KINDS.values())
_REMEDY = "export the run again"


def check_folder(folder: Path) -> None:
    """Checks that an exported folder names classes of this package alone, each in its place.

    Raises:
        ValueError: naming the file, the key and the class that is not.
    """
    file = folder / INDEX
    index = read_json(file, _REMEDY)
    if index.get("_class_name") != _PIPELINE:
        raise ValueError(f"{file}: _class_name is {index.get('_class_name')!r}, not {_PIPELINE}; {_REMEDY}")
    for name, value in index.items():
        if name in _KINDS and value != _OURS:
            raise ValueError(f"{file}: {name} is {value}, not {_OURS}; if you trust who wrote it, say so with {FLAG}")
        if name not in _KINDS and isinstance(value, list):  # diffusers would import it
            raise ValueError(f"{file}: {name} is {value}, but an {_PIPELINE} has no such part; {_REMEDY}")
    model = index.get("model")
    if model is not None and not (isinstance(model, dict) and isinstance(model.get("class_path"), str)):
        raise ValueError(f"{file}: model names no class_path; {_REMEDY}")
    for name, kind in _KINDS.items():
        read_part(folder / name / PART, (kind,))


def read_part(file: Path, kinds: tuple[type, ...] = PARTS) -> dict[str, Any]:
    """The spec in a ``part.json``, in today's names, whose class is one of ``kinds``.

    Raises:
        ValueError: for another file, and for a class that ``builder`` refuses.
    """
    spec = migrate_part(read_json(file, _REMEDY))
    if "class_path" not in spec or not isinstance(spec["init_args"], dict):
        raise ValueError(f"{file}: names no class_path with init_args; {_REMEDY}")
    builder(spec, kinds, str(file))
    return dict(spec)


def kept(value: Any, folder: Path) -> Any:
    """An argument as a saved part names it; a file or folder is copied into ``folder``, or as it."""
    source = Path(value).expanduser() if isinstance(value, str) and value else None
    if source is not None and source.is_dir():
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return f"{HERE}/{folder.name}"
    if source is not None and source.is_file():
        folder.mkdir(exist_ok=True)
        shutil.copy(source, folder)
        return f"{HERE}/{folder.name}/{source.name}"
    return value


def found(value: Any, folder: Path) -> Any:
    """The inverse of ``kept``."""
    if value == HERE or (isinstance(value, str) and value.startswith(f"{HERE}/")):
        return str(folder / value)
    return value
