"""Step count and guidance scale of generated images, and the tag that loggers and file names carry for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class SamplingConfig:
    """Step count and guidance scale of generated images.

    Attributes:
        steps: network steps from noise to data.
        guidance_scale: scale of classifier-free guidance; None is the module's own.
        is_main: whether the scale is the first of those that a callback samples with. Tags leave out the main scale.
    """

    steps: int
    guidance_scale: float | None = None
    is_main: bool = True

    @property
    def tag(self) -> str:
        """Last part of a TensorBoard tag, part of a file name: ``4step``, or ``4step_cfg2`` beside the main scale."""
        return f"{self.steps}step" + self._scale("_cfg")

    @property
    def title(self) -> str:
        """Heading in tables and figures: "4 steps", or "4 steps, cfg2" beside the main scale."""
        return step_name(self.steps) + self._scale(", cfg")

    @property
    def short_title(self) -> str:
        """Name in a line of log: "4", or "4_cfg2" beside the main scale."""
        return f"{self.steps}" + self._scale("_cfg")

    @property
    def curve(self) -> tuple[int, float | None]:
        """Key of the curve in one run: the main scale keeps its curve when a resumed run gives it another value."""
        return self.steps, None if self.is_main else self.guidance_scale

    def resolve(self, default: float) -> SamplingConfig:
        """This config with the scale ``default``, the module's own, in place of None."""
        return self if self.guidance_scale is not None else replace(self, guidance_scale=default)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SamplingConfig:
        """The config in a row of ``scores.jsonl`` or ``summary.json``.

        Rows of earlier versions hold the tag as ``label``, and ``guidance`` where they hold the scale at all.
        """
        if "is_main" in row:
            scale = row["guidance_scale"]
            return cls(int(row["steps"]), None if scale is None else float(scale), bool(row["is_main"]))
        steps, _, rest = row["label"].partition("step")
        scale = float(rest.removeprefix("_cfg")) if rest else None
        guidance = row.get("guidance", scale)
        return cls(int(steps), None if guidance is None else float(guidance), not rest)

    def _scale(self, prefix: str) -> str:
        return "" if self.is_main else f"{prefix}{self.guidance_scale:g}"


def sampling_configs(steps: Sequence[int], guidance_scale: Sequence[float] | float | None) -> list[SamplingConfig]:
    """Every step count with every guidance scale; the first scale is the main one.

    Raises:
        ValueError: for no step counts, repeated ones, or ones below 1.
    """
    if not steps or len(set(steps)) < len(steps) or min(steps) < 1:
        raise ValueError(f"steps must be different whole numbers from 1 on, got {list(steps)}; e.g. [1, 2, 4]")
    scales: list[float | None] = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale]
    return [SamplingConfig(n, scale, i == 0) for i, scale in enumerate(scales or [None]) for n in steps]


def step_name(steps: int) -> str:
    """A step count in words: "1 step", "2 steps"."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"
