"""The JSON files of an exported folder, which a stranger may have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emf_lightning.earlier_exports import migrate_part
from emf_lightning.files import read_json
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.part_classes import FLAG, builder
from emf_lightning.text.base import TextEncoder

INDEX = "model_index.json"
HERE = "."

INSTALLED_PIPELINE = "EMFPipeline"
INSTALLED_PART = ["emf_lightning.pipeline_part", "PipelinePart"]
EARLIER_PART = ["emf_lightning.pipeline", "PipelinePart"]
CARRIED_PIPELINE = ["pipeline", "EMFPipeline"]
CARRIED_PART = ["emf_part", "PipelinePart"]
"""Classes as an index names them: of this package, or in files of the folder that import it."""

KINDS: dict[str, type] = {"transformer": FlowMapNetwork, "vae": Autoencoder, "text_encoder": TextEncoder}
PARTS = tuple(KINDS.values())

_CONFIG = "config.json"
_SPEC = "_emf_part"
_EARLIER = "part.json"
_REMEDY = "export the run again"


def check_folder(folder: Path) -> None:
    """Checks that an exported folder names classes of this package alone, each in its place.

    Raises:
        ValueError: naming the file, the key and the class that is not.
    """
    file = folder / INDEX
    index = read_json(file, _REMEDY)
    if index.get("_class_name") not in (INSTALLED_PIPELINE, CARRIED_PIPELINE):
        raise ValueError(f"{file}: _class_name is {index.get('_class_name')!r}, not {INSTALLED_PIPELINE}; {_REMEDY}")
    for name, value in index.items():
        if name in KINDS and value not in (EARLIER_PART, CARRIED_PART):
            raise ValueError(f"{file}: {name} is {value}, not {CARRIED_PART}; if you trust it, say so with {FLAG}")
        if name not in (*KINDS, "_class_name") and isinstance(value, list):  # diffusers would import it
            raise ValueError(f"{file}: {name} is {value}, but an {INSTALLED_PIPELINE} has no such part; {_REMEDY}")
    model = index.get("model")
    if model is not None and not (isinstance(model, dict) and isinstance(model.get("class_path"), str)):
        raise ValueError(f"{file}: model names no class_path; {_REMEDY}")
    for name, kind in KINDS.items():
        read_part(folder / name, (kind,))


def read_part(folder: Path, kinds: tuple[type, ...] = PARTS) -> dict[str, Any]:
    """The spec of a part, in today's names, whose class is one of ``kinds``.

    Raises:
        ValueError: for another file, and for a class that ``builder`` refuses.
    """
    file, earlier = folder / _CONFIG, folder / _EARLIER
    content = read_json(file, _REMEDY) if file.is_file() or not earlier.is_file() else {}
    if _SPEC not in content and earlier.is_file():
        file, content = earlier, {_SPEC: read_json(earlier, _REMEDY)}
    spec = migrate_part(content.get(_SPEC))
    if not isinstance(spec, dict) or "class_path" not in spec or not isinstance(spec["init_args"], dict):
        raise ValueError(f"{file}: names no class_path with init_args; {_REMEDY}")
    builder(spec, kinds, str(file))
    return dict(spec)


def own_modules(folder: Path) -> list[str]:
    """The modules outside this package whose classes an exported folder names: it loads where Python finds them."""

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict) and isinstance(value.get("class_path"), str):
            yield value["class_path"].rpartition(".")[0]
        if isinstance(value, (dict, list)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from named(inner)

    files = [read_json(folder / INDEX, _REMEDY), *(read_part(folder / name) for name in KINDS)]
    return sorted({name for file in files for name in named(file) if name.partition(".")[0] != __package__})


def write_part(folder: Path, spec: dict[str, Any]) -> None:
    """Writes the spec of a part into its ``config.json``, the file that diffusers downloads beside weights."""
    file = folder / _CONFIG
    config = read_json(file, _REMEDY) if file.is_file() else {}
    config.pop("_name_or_path", None)  # the folder that diffusers read it from
    file.write_text(json.dumps(config | {_SPEC: spec}, indent=2) + "\n")


def kept(value: Any, folder: Path, name: str, encoder: bool = False) -> Any:
    """An argument of a part as its spec in ``folder`` names it: files and folders in it are copied to ``folder/name``.

    Of a whole pipeline's folder an ``encoder`` keeps what text encoders read: ``text_encoder*`` and ``tokenizer*``.
    """
    if isinstance(value, dict):
        return {key: kept(inner, folder, f"{name}/{key}", encoder) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [kept(inner, folder, f"{name}/{place}", encoder) for place, inner in enumerate(value)]
    source = os.path.expanduser(value) if isinstance(value, str) and value else ""
    if os.path.isdir(source):  # unlike pathlib's, it takes texts longer than any path
        shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=_other_parts if encoder else None)
        return f"{HERE}/{name}"
    if os.path.isfile(source):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
        return f"{HERE}/{name}/{Path(source).name}"
    return value


def _other_parts(folder: str, names: list[str]) -> list[str]:
    """The folders of a whole pipeline's other parts: networks, autoencoders."""
    read = ("text_encoder", "tokenizer")
    if not any(name.startswith(read[0]) and os.path.isdir(os.path.join(folder, name)) for name in names):
        return []
    return [name for name in names if os.path.isdir(os.path.join(folder, name)) and not name.startswith(read)]


def found(value: Any, folder: Path, here: Path | None = None) -> Any:
    """The inverse of ``kept``; ``HERE`` alone is ``here``, by default the folder."""
    if isinstance(value, dict):
        return {key: found(inner, folder, here) for key, inner in value.items()}
    if isinstance(value, list):
        return [found(inner, folder, here) for inner in value]
    if value == HERE:
        return str(folder if here is None else here)
    return str(folder / value) if isinstance(value, str) and value.startswith(f"{HERE}/") else value
