"""Files of adapters without their parent, in the layout that diffusers' ``load_lora_weights`` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emf_lightning.digests import check_digests
from emf_lightning.files import read_json, to_json
from emf_lightning.networks.adapter import Adapter
from emf_lightning.pretrained.files import config_of, tensors_of
from emf_lightning.pretrained.loading import PretrainedWeights

_CONFIG, _KEY = "config.json", "_flow_adapter"
_ADAPTERS, _TRAINED = "pytorch_lora_weights", "trained_weights"


@dataclass(frozen=True)
class SavedAdapter:
    """A folder with adapters, and what trained beside them, without the parent's weights.

    Attributes:
        weights: the folder.
        parent: the weights that they change.
        adapter: their settings.
        fingerprint: of the parent's weights.
        recorded: the network's parametrization, as its configuration names it.
    """

    weights: PretrainedWeights
    parent: PretrainedWeights
    adapter: Adapter
    fingerprint: str
    recorded: dict[str, Any]

    @classmethod
    def at(cls, weights: PretrainedWeights) -> SavedAdapter | None:
        """The adapters in ``weights``; None where these are a whole network, or nothing that can be read."""
        try:
            config = config_of(weights.path, weights.subfolder)
        except (OSError, ValueError):  # which loading them as a network says better
            return None
        about = config.get(_KEY)
        if about is None:
            return None
        try:
            parent, adapter = PretrainedWeights(**about["parent"]), Adapter(**about["adapter"])
            recorded = {key: value for key, value in config.items() if key.startswith("_flow_") and key != _KEY}
            return cls(weights, parent, adapter, str(about["fingerprint"]), recorded)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{weights}: {_CONFIG}: {_KEY} describes no adapters ({error}); export it again"
            ) from error

    def load(self, model: nn.Module, prefix: str) -> set[str]:
        """Loads the adapters into ``model``, which has them; returns the names of all parameters that were read.

        Raises:
            ValueError: for damaged files, and for other adapters than the configuration says.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        check_digests(Path(self.weights.path))
        where = {"subfolder": self.weights.subfolder}
        try:
            adapters = tensors_of(self.weights.path, f"{prefix}.", stem=_ADAPTERS, **where)
        except OSError as error:
            raise ValueError(f"{self.weights}: no {_ADAPTERS}.safetensors is there ({error})") from error
        try:
            beside = tensors_of(self.weights.path, "", stem=_TRAINED, **where)
        except OSError:
            beside = {}
        trained = {name for name, each in model.named_parameters() if each.requires_grad and ".lora_" not in name}
        state = model.state_dict()
        own = {name: state[name] for name in trained | (beside.keys() & state.keys())}
        differing = _differing(get_peft_model_state_dict(model), adapters) + _differing(own, beside)
        if differing:
            rule = f"its weights are not those that its {_CONFIG} describes ({min(differing)})"
            raise ValueError(f"{self.weights}: {rule}; write it again")
        set_peft_model_state_dict(model, adapters)
        model.load_state_dict(beside, strict=False)
        return {*own}


def _differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names that one of the two lacks, or that have other shapes."""
    return [
        name
        for name in {*ours, *theirs}
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]


def save_adapter(
    model: Any,
    prefix: str,
    folder: Path,
    adapter: Adapter,
    parent: PretrainedWeights,
    fingerprint: str,
    kept: Iterable[str],
) -> None:
    """Writes what ``SavedAdapter`` reads: adapters under diffusers' names, and the parameters ``kept`` beside them."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model.save_config(str(folder))
    if Path(parent.path).is_dir():
        parent = replace(parent, path=str(Path(parent.path).resolve()))  # the folder is read from anywhere
    about = {"adapter": asdict(adapter), "parent": asdict(parent), "fingerprint": fingerprint}
    config = read_json(folder / _CONFIG, "save it again")
    config.pop("_name_or_path", None)  # the parent's, which `about` names
    (folder / _CONFIG).write_text(to_json(config | {_KEY: about}))
    settings = model.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])  # a set
    metadata = LoraBaseMixin.pack_weights(settings, prefix)  # alpha stands there alone
    layers = LoraBaseMixin.pack_weights(get_peft_model_state_dict(model), prefix)
    LoraBaseMixin.write_lora_layers(layers, str(folder), True, f"{_ADAPTERS}.safetensors", None, True, metadata)
    state = model.state_dict()
    beside = {name: state[name].contiguous() for name in kept if ".lora_" not in name}
    if beside:
        save_file(beside, folder / f"{_TRAINED}.safetensors", metadata={"format": "pt"})


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    """A short digest of the first numbers of each tensor; empty on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            return ""
        first = tensor.detach().flatten()[:64].to("cpu", torch.float64)
        digest.update(f"{name}{list(tensor.shape)}{first.tolist()}".encode())
    return digest.hexdigest()[:16]
