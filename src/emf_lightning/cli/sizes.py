"""Sizes of an experiment's parts, counted on the meta device: no memory is allocated, no weights are read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.shipped import with_shipped_files
from emf_lightning.import_policy import known_classes_only
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.pretrained.files import config_of
from emf_lightning.text.base import TextEncoder
from emf_lightning.text.pretrained import PretrainedTextEncoder

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class EncoderSize:
    """Parameters of a text encoder, bytes of its weights, and width D and length L of its features."""

    parameters: int
    bytes: int
    width: int
    length: int


@dataclass(frozen=True)
class NetworkCost:
    """Cost of one sample.

    Attributes:
        flops: floating point operations of a forward pass; a multiplication and an addition are two.
        activations: bytes kept for the backward pass, in fp32.
        block_activations: bytes that checkpointing keeps: the inputs of all blocks, and all of one block.
    """

    flops: int
    activations: int
    block_activations: int


def on_meta(part: Namespace, kind: type, **linked: Any) -> Any:
    """Builds ``part`` of a configuration on the meta device, with those of the ``linked`` arguments that it has."""
    known = inspect.signature(class_of(part.class_path)).parameters
    with torch.device("meta"):
        return build_part(part.as_dict(), kind, **{name: value for name, value in linked.items() if name in known})


def build_part(spec: dict[str, Any], kind: type, **arguments: Any) -> Any:
    """Builds the object of class ``kind`` with the ``class_path`` and ``init_args`` in ``spec``, and ``arguments``."""
    spec.setdefault("init_args", {}).update(arguments)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    with known_classes_only():
        return parser.instantiate_classes(parser.parse_object({"part": with_shipped_files(spec)})).part


def encoder_size(part: Namespace) -> EncoderSize:
    """Size of the text encoder in ``part`` of a configuration.

    Raises:
        ValueError: if its configuration is neither local nor cached.
    """
    kind: Any = class_of(part.class_path)
    if issubclass(kind, PretrainedTextEncoder):
        return _pretrained_size(part.init_args)
    encoder = on_meta(part, TextEncoder) if kind.builds_on_meta else build_part(part.as_dict(), TextEncoder)
    sizes = [(p.numel(), p.element_size()) for p in encoder.parameters()]
    return EncoderSize(sum(n for n, _ in sizes), sum(n * b for n, b in sizes), encoder.width, encoder.length)


def _pretrained_size(arguments: Namespace) -> EncoderSize:
    from transformers import AutoConfig, AutoModel

    from emf_lightning.text.pretrained import _text_tower

    try:
        config = AutoConfig.for_model(**config_of(arguments.model, arguments.get("subfolder")))
    except OSError as error:
        raise ValueError(
            f"data.text: the size of {arguments.model} is not known here; give a folder that is there, or a hub name "
            "of which `hf download NAME config.json` was done"
        ) from error
    with torch.device("meta"):
        tower = _text_tower(AutoModel.from_config(config))
    count = sum(p.numel() for p in tower.parameters())
    return EncoderSize(count, count * _BYTES[arguments.dtype], tower.config.hidden_size, arguments.length)


def network_cost(net: FlowMapNetwork, shape: tuple[int, ...], length: int, width: int) -> NetworkCost:
    """Cost of one sample, latents ``shape`` and ``length`` text tokens, in ``net`` on the meta device."""
    for part in net.modules():  # block_activations below counts its effect
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    with torch.device("meta"):
        z, t = torch.empty(1, *shape), torch.empty(1)
        context, mask = torch.empty(1, length, width), torch.ones(1, length, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(z, t, t, context, mask)
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Tensor] = {}
    inputs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no other storage reuses its address
        return tensor

    def entered(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(next(a for a in (*arguments, *named.values()) if isinstance(a, Tensor)).nbytes)

    hooks = [block.register_forward_pre_hook(entered, with_kwargs=True) for block in net.blocks]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(z, t, t, context, mask)
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    for hook in hooks:
        hook.remove()
    of_blocks = sum(inputs) + activations // len(inputs) if inputs else activations
    return NetworkCost(counter.get_total_flops(), activations, of_blocks)


def encoding_flops(autoencoder: Autoencoder, resolution: int) -> int:
    """Floating point operations of encoding one image."""
    with torch.device("meta"):
        image = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(image)
    return counter.get_total_flops()
