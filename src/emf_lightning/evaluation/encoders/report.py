"""What an encoder study found: a table, a figure, and the retrieved images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.encoders.study import VARIANTS, Discriminability, Disentanglement, Estimate
from emf_lightning.evaluation.reports.figures import STYLE
from emf_lightning.evaluation.reports.report_figures import MARKERS
from emf_lightning.files import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = {
    "BLIP3o-NEXT": (0.734, 0.999),
    "CLIP ViT-L/14": (0.730, 0.967),
    "OpenUni": (0.724, 0.996),
    "Gemma (SANA-1.5)": (0.713, 0.987),
    "Gemma, tuned": (0.694, 0.997),
    "T5-v1.1-XXL": (0.634, 0.893),
}
"""EMF's Tables 1, 2, 7: COCO train2017 with DINOv3, and DPG-Bench's prompts; k and the share removed are left open."""


@dataclass(frozen=True)
class StudiedEncoder:
    """One encoder's numbers.

    Attributes:
        name: of the encoder.
        discriminability: on the corpus.
        disentanglement: of the prompts.
        truncated: share of the corpus's captions that the encoder cut; NaN where it does not count them.
    """

    name: str
    discriminability: Discriminability
    disentanglement: Disentanglement
    truncated: float = float("nan")


@dataclass(frozen=True)
class EncoderStudy:
    """The numbers of several encoders on one corpus.

    Attributes:
        encoders: in the order of the table.
        about: what holds for all of them.
        papers_corpus: whether the paper retrieved among these pairs, so that its Table 1 may stand beside them.
        papers_prompts: whether it took parts from these prompts: Table 2.
    """

    encoders: tuple[StudiedEncoder, ...]
    about: dict[str, Any] = field(default_factory=dict)
    papers_corpus: bool = False
    papers_prompts: bool = False

    def write(self, directory: Path, corpus: PairCorpus) -> None:
        """Writes ``encoders.json``, ``.md`` and ``.png``, and ``retrieved.png``, into ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "encoders": [asdict(encoder) for encoder in self.encoders]}
        (directory / "encoders.json").write_text(to_json(content))
        (directory / "encoders.md").write_text(self.markdown())
        self.figure().savefig(directory / "encoders.png")
        self.retrieved(corpus).savefig(directory / "retrieved.png")

    def markdown(self) -> str:
        """The tables, and how to read them."""
        lines = ["# Text encoders\n", *(f"- {name}: {value}" for name, value in self.about.items()), ""]
        lines += ["## Discriminability: how alike the images of alike captions are\n"]
        lines += ["| encoder | " + " | ".join(VARIANTS) + " | shuffled | chance | best possible | truncated |"]
        lines += ["|---|" + "---|" * (len(VARIANTS) + 4)]
        for encoder in self.encoders:
            found = encoder.discriminability
            cells = [str(found.score[name]) for name in VARIANTS]
            cells += [f"{found.shuffled.mean:.3f}", _number(found.chance), _number(found.best)]
            cells += [_share(encoder.truncated)]
            lines += [f"| {encoder.name} | {' | '.join(cells)} |"]
        lines += _published(0) if self.papers_corpus else []
        lines += ["", "## Disentanglement: how little a prompt's feature moves when a part of it is removed\n"]
        heads = [f"{name}: {what}" for name in VARIANTS for what in ("ablated", "unrelated", "contrast")]
        lines += ["| encoder | " + " | ".join(heads) + " | unseen | truncated |", "|---|" + "---|" * (len(heads) + 2)]
        for encoder in self.encoders:
            part = encoder.disentanglement
            cells = []
            for name in VARIANTS:
                cells += [str(part.ablated[name]), str(part.unrelated[name]), str(part.contrast[name])]
            cells += [f"{part.unseen:.1%}", _share(part.truncated)]
            lines += [f"| {encoder.name} | {' | '.join(cells)} |"]
        lines += _published(1) if self.papers_prompts else []
        return "\n".join([*lines, "", READING])

    def figure(self) -> Figure:
        """Encoders by both axes: raw as the paper has them, and centred with the contrast in place of the cosine."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6.8, 3.0), layout="constrained")
            panels = figure.subplots(1, 2)
            for axes, name, title in zip(
                panels, VARIANTS[:2], ("as published", "without the common direction"), strict=True
            ):
                for number, encoder in enumerate(self.encoders):
                    x = encoder.discriminability.score[name]
                    part = encoder.disentanglement
                    y = part.ablated[name] if name == "raw" else part.contrast[name]
                    errors = {"xerr": _bars(x), "yerr": _bars(y)}
                    style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}
                    axes.errorbar(x.mean, y.mean, **errors, **style, label=encoder.name, capsize=2, elinewidth=0.8)
                chance = self.encoders[0].discriminability.chance
                if not np.isnan(chance):
                    axes.axvline(chance, color="#999999", linestyle=":", linewidth=0.8)
                axes.set(title=title, xlabel="discriminability", ylabel="disentanglement")
                axes.margins(x=0.1, y=0.1)
            panels[0].legend(loc="best", labelspacing=0.3)
        return figure

    def retrieved(self, corpus: PairCorpus) -> Figure:
        """The images that each encoder's captions retrieve: a row for each query, its own image first."""
        import matplotlib
        from matplotlib.figure import Figure

        queries = list(self.encoders[0].discriminability.retrieved)
        k = max(len(found) for found in self.encoders[0].discriminability.retrieved.values())
        columns = 1 + k * len(self.encoders)
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(1.6 + 0.7 * columns, 0.85 * len(queries) + 0.3), layout="constrained")
            grid = figure.subplots(len(queries), columns, squeeze=False)
            for row, query in zip(grid, queries, strict=True):
                pairs = [query, *(p for e in self.encoders for p in e.discriminability.retrieved.get(query, []))]
                for axes in row:
                    axes.set_axis_off()
                for axes, pair in zip(row, pairs, strict=False):
                    axes.imshow(corpus.image(pair))
                caption = fill(corpus.captions[query], 26)
                row[0].text(-0.1, 0.5, caption, transform=row[0].transAxes, ha="right", va="center", fontsize=5.5)
            grid[0][0].set_title("query", fontsize=6.5)
            for number, encoder in enumerate(self.encoders):
                grid[0][1 + k * number].set_title(encoder.name, fontsize=6.5, loc="left")
        return figure


READING = """\
How to read it. Intervals are 95 %, bootstrapped over captions; those of a contrast over all that it is made of. A
constant encoder scores chance and 1.000 raw: the raw cosine of an ablated prompt means nothing without that of
unrelated prompts, and the contrast between them, (ablated - unrelated) / (1 - unrelated), has no value where all
captions are alike. A high contrast is also little sensitivity to what was removed. Shuffled features go through the
same code and must score chance. `unseen` removals moved no feature further than rounding does; `truncated` captions
and prompts were cut by the encoder.
"""


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _share(value: float) -> str:
    return "not counted" if np.isnan(value) else f"{value:.1%}"


def _published(column: int) -> list[str]:
    return [f"| {name} (published) | {values[column]:.3f} |" for name, values in PUBLISHED.items()]


def _bars(estimate: Estimate) -> Sequence[Sequence[float]]:
    return [[max(estimate.mean - estimate.low, 0)], [max(estimate.high - estimate.mean, 0)]]
