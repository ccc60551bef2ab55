"""The second time input of any diffusers model, by hooks on its time embedding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emf_lightning.networks.architecture_checks import require
from emf_lightning.networks.two_time.rules import AnchoredInterval, IntervalInput, Modulation, combined

INTERVAL = "interval"
"""Name of m' inside m: its weights are ``<embedding>.interval.*``."""

NEGATIVE = "negative"
"""Name, inside m, of the embedding of negative times, where a network knows a second flow there."""


@dataclass(frozen=True)
class TimePlaces:
    """Where a diffusers model keeps its time embedding, as paths of submodules.

    Attributes:
        embedding: the module m, from the time or its sinusoid to an embedding.
        sinusoid: the module from the time to its sinusoid, where it stands before ``embedding``.
        conditioning: the module whose output goes to the blocks, for ``DecoupledInterval``: ``embedding`` itself, or
            one whose first argument is the time; None where there is none.
        argument: the name of the blocks' argument that takes it.
        output_norm: the module beside the blocks that takes it, and its argument's name; None if it takes another.
        reversed: whether the model's time is 0 at noise.
    """

    embedding: str
    sinusoid: str | None = None
    conditioning: str | None = None
    argument: str = "temb"
    output_norm: tuple[str, str] | None = None
    reversed: bool = False


class TwoTimeEmbedding:
    """Makes a model's time embedding depend on r and t: within ``at(r, t)``, m's output is the rule's.

    The model's class, names and configuration stay as they are. m' is a part of m: where the model has none, a copy of
    m, which trains even where m is frozen. The times enter here and not through the model, which may cast them to
    bf16: t - r stays fp32.

    Args:
        model: of diffusers.
        places: where it keeps its time.
        rule: that joins r and t.
        blocks: of the model, in the order in which they run.
        scale: the model's time at t = 1.

    Attributes:
        ignored: whether m's output stays the parent's.

    Raises:
        ValueError: for a rule by blocks on a model that has no such blocks, or fewer.
    """

    def __init__(
        self, model: nn.Module, places: TimePlaces, rule: IntervalInput, blocks: Sequence[nn.Module], scale: float
    ) -> None:
        self.places, self.rule, self.scale = places, rule, scale
        self.ignored = False
        self._times: tuple[Tensor, Tensor] | None = None
        self._sinusoid: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        if places.sinusoid is not None and (rule.blocks_at_t is None or places.conditioning == places.embedding):
            self._sinusoid = model.get_submodule(places.sinusoid)
        if rule.blocks_at_t is not None:
            self._take_halves(model, blocks, rule.blocks_at_t)
            return
        embedding = model.get_submodule(places.embedding)
        if rule.embeds_length and not hasattr(embedding, INTERVAL):
            embedding.add_module(INTERVAL, copy.deepcopy(embedding).requires_grad_(True))
        self._hooks = [embedding.register_forward_hook(self._join, with_kwargs=True)]

    def remove(self) -> None:
        """Takes the second time input out of the model again."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def at(self, r: Tensor, t: Tensor) -> Iterator[None]:
        """A context in which the model is called at ``r`` and ``t``, ``[B]``, in the model's scale."""
        self._times = r, t
        try:
            yield
        finally:
            self._times = None

    def _join(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Modulation:
        """Forward hook of m: the rule's output instead."""
        if self._times is None or self.ignored:  # the parent's
            return output

        def embed(embedding: Any, time: Tensor) -> Modulation:
            taken = time if self._sinusoid is None else self._sinusoid(time).to(args[0].dtype)
            return embedding(taken, *args[1:], **kwargs)

        def embed_time(time: Tensor) -> Modulation:
            if not hasattr(module, NEGATIVE):
                return embed(module.forward, self.scale - time if self.places.reversed else time)
            negative = (time < 0)[:, None]
            both = embed(module.forward, time.abs()), embed(getattr(module, NEGATIVE), time.abs())
            return combined(lambda first, second: torch.where(negative, second, first), *both)

        return self.rule(embed_time, partial(embed, getattr(module, INTERVAL, None)), *self._times)

    def _take_halves(self, model: nn.Module, blocks: Sequence[nn.Module], at_t: int) -> None:
        name, places = type(model).__name__, self.places
        if places.conditioning is None:
            raise ValueError(
                f"{self.rule.__class__.__name__}: {name}'s blocks share no time embedding that it could split"
            )
        require(self.rule, at_t <= len(blocks), f"blocks={at_t}, but the network has {len(blocks)}")
        self._hooks = [model.get_submodule(places.conditioning).register_forward_hook(self._join, with_kwargs=True)]
        takers = [(block, places.argument, int(i >= at_t)) for i, block in enumerate(blocks)]
        if places.output_norm is not None:
            takers.append((model.get_submodule(places.output_norm[0]), places.output_norm[1], 1))
        for module, argument, half in takers:
            position = list(inspect.signature(module.forward).parameters).index(argument)
            take = partial(_take_half, argument=argument, position=position, half=half)
            self._hooks.append(module.register_forward_pre_hook(take, with_kwargs=True))


@contextmanager
def without_interval(net: Any) -> Iterator[bool]:
    """A context in which ``net`` ignores r and is the flow that it was made from.

    Yields whether ``net`` has such a flow: whether its interval is anchored.
    """
    two_times: TwoTimeEmbedding | None = getattr(net, "two_times", None)
    if two_times is None or not isinstance(two_times.rule, AnchoredInterval):
        yield False
        return
    two_times.ignored = True
    try:
        yield True
    finally:
        two_times.ignored = False


def _take_half(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], argument: str, position: int, half: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook: the module's half of two embeddings that lie side by side."""
    both = kwargs[argument] if argument in kwargs else args[position]
    mine = both.chunk(2, dim=1)[half].contiguous()  # of the parent's strides, so that its kernels round alike
    if argument in kwargs:
        return args, kwargs | {argument: mine}
    return (*args[:position], mine, *args[position + 1 :]), kwargs
