"""Results of an encoder study: tables, a figure, and the retrieved images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.encoders.discriminability import Discriminability
from emf_lightning.evaluation.encoders.disentanglement import Disentanglement
from emf_lightning.evaluation.encoders.features import VARIANTS
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.reports.figures import paper_style, save_figure
from emf_lightning.evaluation.reports.report_figures import MARKERS
from emf_lightning.files import to_json, write_atomic

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
"""EMF's Tables 1, 2, 7: COCO train2017 with DINOv3, and DPG-Bench's prompts, with unknown k and share removed."""


@dataclass(frozen=True)
class StudiedEncoder:
    """One encoder's numbers; ``truncated`` is the share of the corpus's captions that it truncated, NaN if unknown."""

    name: str
    discriminability: Discriminability
    disentanglement: Disentanglement
    truncated: float = float("nan")


@dataclass(frozen=True)
class EncoderStudy:
    """The numbers of several encoders on one corpus.

    Attributes:
        about: facts common to all encoders.
        paper_corpus: whether the corpus is that of the paper's Table 1, whose values are then added.
        paper_prompts: whether the prompts are those of the paper's Table 2, whose values are then added.
    """

    encoders: tuple[StudiedEncoder, ...]
    about: dict[str, Any] = field(default_factory=dict)
    paper_corpus: bool = False
    paper_prompts: bool = False

    def write(self, directory: Path, corpus: PairCorpus) -> None:
        """Writes ``encoders.json``, ``.md`` and ``.png``, and ``retrieved.png``, into ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "encoders": [asdict(encoder) for encoder in self.encoders]}
        write_atomic(directory / "encoders.json", to_json(content))
        write_atomic(directory / "encoders.md", self.markdown())
        save_figure(self.figure(), directory / "encoders.png")
        save_figure(self.retrieved(corpus), directory / "retrieved.png")

    def markdown(self) -> str:
        """The tables and an explanation."""
        lines = ["# Text encoders\n", *(f"- {name}: {value}" for name, value in self.about.items()), ""]
        lines += ["## Discriminability: how alike the images of alike captions are\n"]
        columns = ["encoder", *VARIANTS, "shuffled", "chance", "best possible", "truncated"]
        rows = []
        for encoder in self.encoders:
            found = encoder.discriminability
            rows.append([encoder.name, *(str(found.score[name]) for name in VARIANTS), f"{found.shuffled.mean:.3f}"])
            rows[-1] += [_number(found.chance), _number(found.best), _share(encoder.truncated)]
        rows += _published(0, len(columns)) if self.paper_corpus else []
        lines += [markdown_table(columns, rows)]
        lines += ["", "## Disentanglement: how little a prompt's feature moves when a part of it is removed\n"]
        numbers = [f"{name}: {number}" for name in VARIANTS for number in ("ablated", "unrelated", "contrast")]
        columns, rows = ["encoder", *numbers, "unseen", "truncated"], []
        for encoder in self.encoders:
            part = encoder.disentanglement
            cells = [str(by[name]) for name in VARIANTS for by in (part.ablated, part.unrelated, part.contrast)]
            rows.append([encoder.name, *cells, f"{part.unseen:.1%}", _share(part.truncated)])
        rows += _published(1, len(columns)) if self.paper_prompts else []
        lines += [markdown_table(columns, rows)]
        return "\n".join([*lines, "", READING])

    def table(self) -> str:
        """The means as plain text of at most 100 columns; intervals and the other numbers are in ``markdown``."""
        names = [_shortened(encoder.name) for encoder in self.encoders]
        width = max(len(name) for name in ("encoder", *names))
        lines = [f"{'':{width}}  {'discriminability':^23}  {'disentanglement':^23}"]
        lines += [
            f"{'encoder':{width}}  {'raw':>7} {'centred':>7} {'chance':>7}  {'ablated':>7} {'contrast':>8}  cut off"
        ]
        for name, encoder in zip(names, self.encoders, strict=True):
            found, part = encoder.discriminability, encoder.disentanglement
            first = f"{found.score['raw'].mean:7.3f} {found.score['centred'].mean:7.3f} {found.chance:7.3f}"
            second = f"{part.ablated['raw'].mean:7.3f} {part.contrast['centred'].mean:8.3f}"
            lines.append(f"{name:{width}}  {first}  {second}  {_share(encoder.truncated)}")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Encoders by both scores: raw, as in the paper, and centred, with the contrast in place of the cosine."""
        from matplotlib.figure import Figure

        with paper_style():
            figure = Figure(figsize=(6.8, 3.0), layout="constrained")
            panels = figure.subplots(1, 2)
            titles = {"raw": "as published", "centred": "without the common direction"}
            quantities = {"raw": "disentanglement", "centred": "contrast with unrelated prompts"}
            for axes, (name, title) in zip(panels, titles.items(), strict=True):
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
                axes.set(title=title, xlabel="discriminability", ylabel=quantities[name])
                axes.margins(x=0.1, y=0.1)
            panels[0].legend(loc="best", labelspacing=0.3)
        return figure

    def retrieved(self, corpus: PairCorpus) -> Figure:
        """The images that each encoder retrieves: a row for each query, its own image first."""
        from matplotlib.figure import Figure

        first = self.encoders[0].discriminability.retrieved
        queries, k = list(first), max(map(len, first.values()))
        columns = 1 + k * len(self.encoders)
        with paper_style():
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
How to read it. Intervals are 95 %, bootstrapped over captions. A constant encoder scores chance, and 1.000 raw: the raw
cosine of an ablated prompt means nothing without that of unrelated prompts. The contrast between them,
(ablated - unrelated) / (1 - unrelated), has no value where all captions have one feature; a high contrast may also mean
that the encoder ignores the removed part. Shuffled features go through the same code and must score chance. `unseen`
removals changed the feature no more than rounding does; the encoder cut off `truncated` captions and prompts.
"""


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def _share(value: float) -> str:
    return "not counted" if np.isnan(value) else f"{value:.1%}"


def _published(column: int, width: int) -> list[list[str]]:
    """The paper's rows, padded with empty cells to ``width`` columns."""
    return [[f"{name} (published)", f"{row[column]:.3f}", *[""] * (width - 2)] for name, row in PUBLISHED.items()]


def _bars(estimate: Estimate) -> Sequence[Sequence[float]]:
    return [[max(estimate.mean - estimate.low, 0)], [max(estimate.high - estimate.mean, 0)]]


def _shortened(name: str) -> str:
    return name if len(name) <= 36 else f"{name[:35]}…"
