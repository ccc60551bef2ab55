"""Sizes of an experiment's parts, counted on the meta device: no memory is allocated, no weights are read."""

from __future__ import annotations

from collections.abc import Callable
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
from emf_lightning.networks.discriminator import Discriminator, DiscriminatorCallable
from emf_lightning.part_classes import takes
from emf_lightning.pretrained.sizes_alone import sizes_alone
from emf_lightning.text.base import TextEncoder


@dataclass(frozen=True)
class EncoderSize:
    """Size of a text encoder.

    Attributes:
        parameters: their number.
        bytes: of its weights.
        width: D of its features.
        length: L of its features.
        image_tokens: tokens of the image of a pair; 0 if it reads captions alone.
        flops: operations of a caption; of a pair, those of the image's tokens before those of the rest.
    """

    parameters: int
    bytes: int
    width: int
    length: int
    image_tokens: int
    flops: tuple[int, ...]


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


def sized(part: Namespace, kind: type, **linked: Any) -> Any:
    """Builds ``part`` of a configuration in its size alone, with those of the ``linked`` arguments that it has.

    That is on the meta device; a class that needs numbers at its start is built elsewhere, its models still without
    weights.
    """
    one = class_of(part.class_path)
    arguments = {name: value for name, value in linked.items() if takes(one, name)}
    with sizes_alone(own=not one.__module__.startswith("emf_lightning.")):
        try:
            with torch.device("meta"):
                return build_part(part.as_dict(), kind, **arguments)
        except ValueError:
            raise
        except Exception:  # whatever the class does with numbers that are not there
            return build_part(part.as_dict(), kind, **arguments)


def build_part(spec: dict[str, Any], kind: Any, **arguments: Any) -> Any:
    """Builds the object of class ``kind`` with the ``class_path`` and ``init_args`` in ``spec``, and ``arguments``."""
    spec.setdefault("init_args", {}).update(arguments)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    with known_classes_only():
        return parser.instantiate_classes(parser.parse_object({"part": with_shipped_files(spec)})).part


def encoder_size(encoder: TextEncoder) -> EncoderSize:
    """Size of a text encoder."""
    encoder = encoder.to("meta")
    sizes = [(p.numel(), p.element_size()) for p in encoder.parameters()]
    count, size = sum(n for n, _ in sizes), sum(n * b for n, b in sizes)
    try:
        flops = tuple(_flops(each) for each in encoder.planned_passes())
    except Exception:  # a model that reads its inputs' numbers
        flops = ()
    flops = flops or (_flops_of_tokens(encoder),)
    return EncoderSize(count, size, encoder.width, encoder.length, encoder.image_tokens, flops)


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def _flops_of_tokens(encoder: TextEncoder) -> int:
    """Two operations for each token and weight of a matrix, embeddings left out."""
    parts = (part for part in encoder.modules() if not isinstance(part, nn.Embedding))
    weights = sum(p.numel() for part in parts for p in part.parameters(recurse=False) if p.ndim > 1)
    return 2 * weights * encoder.length


def network_cost(net: FlowMapNetwork, shape: tuple[int, ...], length: int, width: int) -> NetworkCost:
    """Cost of one sample, latents ``shape`` and ``length`` text tokens, in ``net`` on the meta device."""
    for part in net.modules():  # block_activations below counts its effect
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    with torch.device("meta"):
        z, t = torch.empty(1, *shape), torch.empty(1)
        context, mask = torch.empty(1, length, width), torch.ones(1, length, dtype=torch.bool)
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
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        net(z, t, t, context, mask)
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    for hook in hooks:
        hook.remove()
    of_blocks = sum(inputs) + activations // len(inputs) if inputs else activations
    return NetworkCost(int(counter.get_total_flops()), activations, of_blocks)


def encoding_flops(autoencoder: Autoencoder, resolution: int) -> int:
    """Floating point operations of encoding one image."""
    with torch.device("meta"):
        image = torch.empty(1, 3, resolution, resolution)
    return _flops(lambda: autoencoder.to("meta").encode(image))


def discriminator_size(part: Namespace, net: FlowMapNetwork, shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """Parameters that train, and operations of a pass, of the discriminator in ``part``, made for ``net``."""
    with sizes_alone(), torch.device("meta"):
        critic: Discriminator = build_part(part.as_dict(), DiscriminatorCallable)(net)
        z, t, context, mask = torch.empty(1, *shape), torch.empty(1), torch.empty(1, 2, width), torch.ones(1, 2).bool()
    parameters = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    return parameters, _flops(lambda: critic(z, t, context, mask))
