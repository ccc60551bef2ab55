"""A part of a pipeline, its network, autoencoder or text encoder, in a folder of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_model
from torch import nn

from emf_lightning.exported_files import HERE, PARTS, found, kept, read_part, write_part
from emf_lightning.networks.base import WEIGHTS, FlowMapNetwork
from emf_lightning.part_classes import Spec, builder, takes
from emf_lightning.text.base import TextEncoder
from emf_lightning.weight_variants import plain_names, variant_names

_TRAINING_ONLY = ("architecture", "finetuning", "adapter", "subfolder", "gradient_checkpointing", "compile")
"""Arguments of a network that concern its training or its start, which a saved network does not need."""


class PipelinePart(ModelMixin):
    """A network, autoencoder or text encoder of an experiment, with the spec that builds it again.

    A part with ``save_pretrained`` and a constructor argument ``pretrained`` saves its weights in its library's format,
    so that stock classes read them, too. Another network is built with its arguments and its weights are saved beside
    them. For other parts, files and folders that their arguments name are copied, and hub names stay names.

    Args:
        part: the object.
        spec: how to build it.
    """

    def __init__(self, part: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.part: Any = part
        self.spec = spec
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # tells the device of a part without parameters

    @property
    def device(self) -> torch.device:
        """The device on which the part computes, also without parameters."""
        return self.place.device

    def forward(self, *arguments: Any) -> Any:
        """u of a network, features of a text encoder, images of an autoencoder."""
        return self.part(*arguments)

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None, **_: Any) -> None:
        """Writes the part and its spec into a folder that it makes; files that are there already stay.

        Args:
            save_directory: the folder.
            variant: stands in the names of the weights' files, e.g. ``fp16``.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as name:
            written = Path(name) / "part"  # its mode is that of any folder
            written.mkdir()
            write_part(written, {"class_path": self.spec["class_path"], "init_args": self._write(written)})
            if variant is not None:
                variant_names(written, variant)
            shutil.copytree(written, folder, dirs_exist_ok=True, copy_function=os.replace)

    def _write(self, folder: Path) -> dict[str, Any]:
        """Writes the weights and files of the part; returns its arguments as its spec names them."""
        arguments = dict(self.spec.get("init_args", {}))
        if saves(self.part):
            self.part.save_pretrained(folder)
            arguments = {name: value for name, value in arguments.items() if name not in _TRAINING_ONLY}
            arguments["pretrained"] = HERE
            if "subfolder" in self.spec.get("init_args", {}):
                arguments["subfolder"] = None
            return arguments
        if isinstance(self.part, FlowMapNetwork):
            FlowMapNetwork.save_pretrained(self.part, folder)
        encoder = isinstance(self.part, TextEncoder)
        return {name: kept(value, folder, f"{name}.files", encoder) for name, value in arguments.items()}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **_: Any,
    ) -> PipelinePart:
        """The part saved in a folder.

        Args:
            folder: as ``save_pretrained`` wrote it.
            torch_dtype: of parts without a precision of their own.
            variant: whose weights are read, e.g. ``fp16``.
            device_map: the device of the part, or ``{"": device}``.
            quantization_config: None.

        Raises:
            ValueError: for a folder that names a class from outside this package, see ``builder``, and for a
                ``quantization_config``.
        """
        if quantization_config is not None:
            raise ValueError(
                f"quantization_config: {Path(folder).name} cannot be quantized while it is loaded; leave it out, and "
                "quantize its modules afterwards, e.g. torchao.quantize_(pipe.transformer.part, ...)"
            )
        folder = Path(folder)
        saved = read_part(folder)
        with plain_names(folder, variant) as weights:
            spec, place = [
                {**saved, "init_args": {name: found(value, folder, here) for name, value in saved["init_args"].items()}}
                for here in (weights, folder)
            ]
            part = builder(spec, PARTS, str(folder))()
            if isinstance(part, FlowMapNetwork) and "pretrained" not in saved["init_args"]:
                load_model(part, weights / WEIGHTS)
        if torch_dtype is not None and "dtype" not in saved["init_args"]:
            nn.Module.to(part, dtype=torch_dtype)
        made = cls(part.eval(), place)
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        return made if device is None else made.to(device)


def saves(part: nn.Module) -> bool:
    """Whether a part writes its own weights in its library's format, and reads them again."""
    return callable(getattr(part, "save_pretrained", None)) and takes(type(part), "pretrained")
