"""How large an experiment's parts are, found out on the meta device: nothing is allocated and no weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.pretrained.files import config_of
from emf_lightning.text.base import TextEncoder
from emf_lightning.text.pretrained import PretrainedTextEncoder

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class EncoderSize:
    """A frozen text encoder's size.

    Attributes:
        parameters: how many.
        bytes: of its weights.
        width: D of the features.
        length: L of the features.
    """

    parameters: int
    bytes: int
    width: int
    length: int


@dataclass(frozen=True)
class NetworkCost:
    """What one row costs a network.

    Attributes:
        flops: of one forward pass, floating point operations (a multiplication and an addition are two).
        activations: bytes kept for the backward pass, in fp32.
        block_activations: those that checkpointing keeps: what goes into each block, and all of one block.
    """

    flops: int
    activations: int
    block_activations: int


def on_meta(part: Namespace, kind: type, **linked: Any) -> Any:
    """The object of a configuration's ``part``, on the meta device, with the arguments that are linked to the data."""
    known = {name: value for name, value in linked.items() if name in _parameters(part.class_path)}
    with torch.device("meta"):
        return _instantiated(part, kind, **known)


def _instantiated(part: Namespace, kind: type, **arguments: Any) -> Any:
    spec = part.as_dict()
    spec.setdefault("init_args", {}).update(arguments)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    return parser.instantiate_classes(parser.parse_object({"part": spec})).part


def _parameters(class_path: str) -> Any:
    return inspect.signature(class_of(class_path)).parameters


def encoder_size(part: Namespace) -> EncoderSize:
    """The size of the text encoder that ``part`` of a configuration describes.

    Raises:
        ValueError: where its configuration is neither at hand nor known.
    """
    kind: Any = class_of(part.class_path)
    arguments = part.get("init_args")
    try:
        if issubclass(kind, PretrainedTextEncoder):
            return _pretrained_size(arguments)
    except OSError as error:
        name = arguments.get("model")
        raise ValueError(
            f"data.text: the size of {name} is not known here; give a folder that is there, or a hub name of which "
            "`hf download NAME config.json` was done"
        ) from error
    encoder = on_meta(part, TextEncoder) if kind.builds_on_meta else _instantiated(part, TextEncoder)
    sizes = [(p.numel(), p.element_size()) for p in encoder.parameters()]
    return EncoderSize(sum(n for n, _ in sizes), sum(n * b for n, b in sizes), encoder.width, encoder.length)


def _pretrained_size(arguments: Namespace) -> EncoderSize:
    from transformers import AutoConfig, AutoModel

    from emf_lightning.text.pretrained import _text_tower

    config = AutoConfig.for_model(**config_of(arguments.model))
    with torch.device("meta"):
        tower = _text_tower(AutoModel.from_config(config))
    count = sum(p.numel() for p in tower.parameters())
    return EncoderSize(count, count * _BYTES[arguments.dtype], tower.config.hidden_size, arguments.length)


def network_cost(net: FlowMapNetwork, shape: tuple[int, ...], length: int, width: int) -> NetworkCost:
    """What one row of latents ``shape`` with ``length`` text tokens costs ``net``, which is on the meta device."""
    for part in net.modules():  # what it saves is asked for below
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    with torch.device("meta"):
        z, t = torch.empty(1, *shape), torch.empty(1)
        context, mask = torch.empty(1, length, width), torch.ones(1, length, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(z, t, t, context, mask)
    flops = counter.get_total_flops()
    kept = _kept_bytes(net, lambda: net(z, t, t, context, mask))
    inputs: list[int] = []

    def entered(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(_bytes(next(a for a in (*arguments, *named.values()) if isinstance(a, Tensor))))

    hooks = [block.register_forward_pre_hook(entered, with_kwargs=True) for block in net.blocks]
    net(z, t, t, context, mask)
    for hook in hooks:
        hook.remove()
    return NetworkCost(flops, kept, sum(inputs) + kept // len(inputs) if inputs else kept)


def encoding_flops(autoencoder: Autoencoder, resolution: int) -> int:
    """Operations that encoding one image takes."""
    with torch.device("meta"):
        image = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(image)
    return counter.get_total_flops()


def _kept_bytes(net: nn.Module, forward: Callable[[], Tensor]) -> int:
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
