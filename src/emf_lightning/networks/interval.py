"""The second time input: how a network that knows the time t learns the interval's length t - r."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn


class IntervalEmbedding(AdaLayerNormSingle, ABC):
    """SANA's time embedding, with a second one of the same kind for the interval's length.

    The names of the pretrained module's parameters stay (``emb``, ``linear``), so published weights load; the new
    ones are ``interval.*``. SANA hands ``guidance`` through to this module untouched: it carries r.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(embedding_dim)
        self.interval = AdaLayerNormSingle(embedding_dim)
        self._silent = False

    @torch.no_grad()
    def duplicate(self) -> None:
        """Makes the interval's embedding a copy of the pretrained time embedding (arXiv 2604.18168, section 3)."""
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("interval.")}
        self.interval.load_state_dict(own)

    def refit(self, old_scale: float, new_scale: float, steps: int = 1500, rows: int = 256) -> float:
        """The error left after teaching this module to read ``new_scale`` t as it reads ``old_scale`` t.

        A network trained on 1000 t holds high frequencies in t that flow matching never notices; MeanFlow's du/dt
        multiplies them. Fitting the embedding anew at a small scale keeps its values and makes its derivative smooth
        (arXiv 2511.23342 reports the same step as crucial). Only ``emb`` and ``linear`` change; no data are needed.

        Args:
            old_scale: factor on t in [0, 1] that the module was trained with.
            new_scale: the one it is to be called with from now on.
            steps: of Adam, some 20 seconds' worth at width 192.
            rows: times a step.

        Returns:
            Root mean square error of the modulation, relative to its standard deviation over t.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            grid = torch.linspace(0, 1, 1025, device=self.linear.weight.device)
            with torch.no_grad():
                wanted = super().forward(grid * old_scale, hidden_dtype=self.linear.weight.dtype)
            spread = wanted[0].std(0).norm()
            own = [p for name, p in self.named_parameters() if not name.startswith("interval.")]
            adam = torch.optim.Adam(own, lr=2e-3)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
            for _ in range(steps):
                i = torch.randint(len(grid), (rows,), device=grid.device)
                got = super().forward(grid[i] * new_scale, hidden_dtype=self.linear.weight.dtype)
                loss = sum((a - b[i]).square().mean() / b.var(0).mean() for a, b in zip(got, wanted, strict=True))
                adam.zero_grad()
                torch.autograd.backward(loss)
                adam.step()
                decay.step()
            adam.zero_grad()
            with torch.no_grad():
                got = super().forward(grid * new_scale, hidden_dtype=self.linear.weight.dtype)
                return float((got[0] - wanted[0]).square().mean(0).sum().sqrt() / spread)

    @abstractmethod
    def combine(self, end: Tensor, length: Tensor, zero: Tensor) -> Tensor:
        """One embedding of three: of the end time t, of the length t - r, of the length 0."""

    def forward(
        self,
        timestep: Tensor,
        guidance: Tensor | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The modulation ``[B, 6 D]`` and the embedding ``[B, D]`` of (r, t) = (guidance, timestep)."""
        end = super().forward(timestep, hidden_dtype=hidden_dtype)
        if guidance is None or self._silent:
            return end
        delta = timestep - guidance
        length = self.interval(delta, hidden_dtype=hidden_dtype)
        zero = self.interval(torch.zeros_like(delta), hidden_dtype=hidden_dtype)
        return self.combine(end[0], length[0], zero[0]), self.combine(end[1], length[1], zero[1])


class AnchoredInterval(IntervalEmbedding):
    """m(t) + m'(t - r) - m'(0): at r = t it is the pretrained embedding, bit for bit, and stays so in training."""

    def combine(self, end: Tensor, length: Tensor, zero: Tensor) -> Tensor:
        """The sum, with the length's embedding measured from length 0."""
        return end + (length - zero)


class SummedInterval(IntervalEmbedding):
    """m(t) + m'(t - r), the plain sum of EMF's release: for its checkpoints; it does not preserve the parent."""

    def combine(self, end: Tensor, length: Tensor, zero: Tensor) -> Tensor:
        """The plain sum."""
        return end + length


@contextmanager
def interval_left_out(net: nn.Module) -> Iterator[bool]:
    """A context in which ``net`` is the flow that it was before it knew intervals, whatever r it is given.

    Yields whether there is such a flow: whether its interval's embedding is anchored.
    """
    embeddings = [part for part in net.modules() if isinstance(part, AnchoredInterval)]
    for embedding in embeddings:
        embedding._silent = True
    try:
        yield bool(embeddings)
    finally:
        for embedding in embeddings:
            embedding._silent = False
