"""The adaLN-single time embedding of PixArt and SANA with a second one for the interval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from emf_lightning.networks.guidance_conditioning import ConditionEmbedding
from emf_lightning.networks.two_time.rules import AnchoredInterval, IntervalInput, Modulation

_SMOOTHEST, _STEEPEST, _RIDGE = 2.0, 16.0, 1e-4
"""Slopes of the steps of ``refit``, per unit of t, and its ridge relative to the kernel's diagonal.

On the parent of the shapes experiments, 100 t to t: 5 % error, du/dt 14 % smaller in the mean and at most 30 %.
"""


class IntervalEmbedding(AdaLayerNormSingle):
    """Time embedding m, with a second one of the same kind, m', for the interval's length.

    The names of the pretrained module's parameters stay (``emb``, ``linear``), so published weights load; the new
    ones are ``interval.*`` and, with guidance conditions, ``conditions.*``. SANA passes its argument ``guidance``
    through to this module: it carries r, and the conditions beside it.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(embedding_dim)
        self.interval: AdaLayerNormSingle | None = AdaLayerNormSingle(embedding_dim)
        self.conditions: ConditionEmbedding | None = None
        self.rule: IntervalInput = AnchoredInterval()
        self._ignores_interval = False

    def embed_time(self, time: Tensor, dtype: torch.dtype | None) -> Modulation:
        """m, the pretrained embedding, of ``time`` ``[B]``."""
        return super().forward(time, hidden_dtype=dtype)

    def embed_length(self, length: Tensor, dtype: torch.dtype | None) -> Modulation:
        """m', the interval's embedding, of its ``length`` ``[B]``."""
        assert self.interval is not None
        return self.interval(length, hidden_dtype=dtype)

    def set_rule(self, rule: IntervalInput) -> None:
        """Sets how r and t are combined, and drops m' if the rule does not use it."""
        self.rule = rule
        if not rule.embeds_length:
            self.interval = None

    def forward(
        self,
        timestep: Tensor,
        guidance: Tensor | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> Modulation:
        """The modulation at t = ``timestep``, ``[B]``, in the precision ``hidden_dtype``; SANA passes ``batch_size``.

        ``guidance`` is r, ``[B]``, or r and K conditions, ``[B, 1 + K]``; without it r is t.
        """
        r, *conditions = (timestep,) if guidance is None else guidance.reshape(len(timestep), -1).unbind(1)
        if self._ignores_interval:
            return self.embed_time(timestep, hidden_dtype)
        embed_time, embed_length = (partial(each, dtype=hidden_dtype) for each in (self.embed_time, self.embed_length))
        modulation, embedded = self.rule(embed_time, embed_length, r, timestep)
        if not conditions:
            return modulation, embedded
        assert self.conditions is not None
        shift, embedded_conditions = self.conditions(torch.stack(conditions, 1).to(modulation.dtype))
        return modulation + shift.repeat(1, modulation.shape[1] // shift.shape[1]), embedded + embedded_conditions

    @torch.no_grad()
    def init_interval(self) -> None:
        """Copies the pretrained time embedding to the interval's (arXiv 2604.18168, section 3)."""
        if self.interval is not None:
            own = {k: v for k, v in self.state_dict().items() if k.startswith(("emb.", "linear."))}
            self.interval.load_state_dict(own)

    @torch.no_grad()
    def refit(self, old_scale: float, new_scale: float) -> float:
        """Fits the embedding, trained on ``old_scale`` t with t in [0, 1], anew for later inputs ``new_scale`` t.

        A network trained on 1000 t holds high frequencies in t that do not affect flow matching; MeanFlow's du/dt
        multiplies them. Fitting the embedding anew at a small scale keeps its values and makes its derivative smooth
        (arXiv 2511.23342 reports the same step as crucial). Only ``emb`` changes, and no data are needed: its first
        layer becomes smooth steps spread over t, its second the ridge regression of the old values on them.
        Returns the root mean square error of the modulation, relative to its standard deviation over t.
        """
        generator = torch.Generator().manual_seed(0)
        embedder = self.emb.timestep_embedder
        dtype, device = self.linear.weight.dtype, self.linear.weight.device
        grid = torch.linspace(0, 1, 1025, device=device)
        target = self.embed_time(grid * old_scale, dtype)

        # t as a combination of the sines and cosines, so that a step can have any place and width
        waves = _with_ones(self.emb.time_proj(grid * new_scale).double().cpu())
        *of_waves, constant = torch.linalg.lstsq(
            waves, grid[:, None].double().cpu(), rcond=1e-6, driver="gelsd"
        ).solution
        units = embedder.linear_1.out_features
        steepness = _SMOOTHEST * (_STEEPEST / _SMOOTHEST) ** torch.rand(units, generator=generator, dtype=torch.float64)
        steepness = torch.where(torch.rand(units, generator=generator) < 0.5, -steepness, steepness)
        place = 1.2 * torch.rand(units, generator=generator, dtype=torch.float64) - 0.1
        embedder.linear_1.weight.copy_(steepness[:, None] * torch.cat(of_waves))
        embedder.linear_1.bias.copy_(steepness * (constant - place))

        steps = _with_ones(embedder.act(embedder.linear_1(waves[:, :-1].to(device, dtype))).double().cpu())
        kernel = steps @ steps.T
        kernel.diagonal().add_(_RIDGE * kernel.diagonal().mean())
        solution = steps.T @ torch.linalg.solve(kernel, target[1].double().cpu())
        embedder.linear_2.weight.copy_(solution[:-1].T)
        embedder.linear_2.bias.copy_(solution[-1])

        error = self.embed_time(grid * new_scale, dtype)[0] - target[0]
        return float(error.square().mean(0).sum().sqrt() / target[0].std(0).norm())


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


@contextmanager
def without_interval(net: nn.Module) -> Iterator[bool]:
    """A context in which ``net`` ignores r and is the flow that it was made from.

    Yields whether ``net`` has such a flow: whether its interval's embedding is anchored.
    """
    parts = [part for part in net.modules() if isinstance(part, IntervalEmbedding)]
    embeddings = [part for part in parts if isinstance(part.rule, AnchoredInterval) and part.conditions is None]
    for embedding in embeddings:
        embedding._ignores_interval = True
    try:
        yield bool(embeddings)
    finally:
        for embedding in embeddings:
            embedding._ignores_interval = False
