"""Contact sheet: images of the same prompts and noise side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

from emf_lightning.evaluation.reports.figures import paper_style
from emf_lightning.evaluation.reports.letters import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRECT, WRONG = "#1f8a4c", "#c8443c"
CELL, GAP, LABEL, HEAD, TITLE, EDGE = 0.62, 0.035, 1.45, 0.32, 0.2, 0.06
"""Inches: a cell with its gap, the captions' width, height of the headings and of the title, margin on the right."""
ROWS = 20
"""Rows of one block; further prompts stand in further blocks beside it."""


def contact_sheet(
    prompts: Sequence[str],
    columns: Mapping[str, NDArray[np.uint8]],
    correct: Mapping[str, Sequence[bool]] | None = None,
    title: str = "",
) -> Figure:
    """Images in a grid: a row for each prompt, a column for each sampling config.

    Args:
        prompts: R captions, written beside the rows.
        columns: heading -> images ``[R, H, W, 3]``, 8-bit RGB, e.g. "1 step", "4 steps", "parent, 30 steps".
        correct: heading -> R booleans; these images get a frame, and a tick or a cross. Headings may be left out.
        title: a line above, e.g. run and step.
    """
    from matplotlib.figure import Figure

    blocks = max(math.ceil(len(prompts) / ROWS), 1)
    rows = math.ceil(len(prompts) / blocks)
    block_width = LABEL + CELL * len(columns)
    top = HEAD + (TITLE if title else 0)
    with paper_style():
        width, height = block_width * blocks + EDGE, top + CELL * rows
        figure = Figure(figsize=(width, height))
        plain: dict[str, Any] = {"parse_math": False}  # a prompt may hold dollar signs
        if title:
            figure.text(0.5, 1 - 0.05 / height, title, ha="center", va="top", fontsize=6.5, **plain)
        for number, prompt in enumerate(prompts):
            block, row = divmod(number, rows)
            left, bottom = block_width * block + LABEL, CELL * (rows - 1 - row)
            text = _wrapped(drawable(prompt.removeprefix("a photo of ")))
            place = (left - 0.08) / width, (bottom + CELL / 2) / height
            figure.text(*place, text, ha="right", va="center", fontsize=7.5 if text.count("\n") < 3 else 6.5, **plain)
            for column, (heading, images) in enumerate(columns.items()):
                side = CELL - 2 * GAP
                x, y = left + CELL * column + GAP, bottom + GAP
                axes = figure.add_axes((x / width, y / height, side / width, side / height))
                truth = correct[heading][number] if correct and heading in correct else None
                _show(axes, images[number], truth)
                if row == 0:
                    place = (x + side / 2) / width, 1 - (top - 0.1 * HEAD) / height
                    words = fill(heading, 11, break_long_words=False)
                    figure.text(*place, words, ha="center", va="bottom", fontsize=6.5, fontweight="bold", **plain)
    return figure


def _wrapped(text: str) -> str:
    """``text`` in at most four lines of 22 columns; a letter of Chinese, Japanese or Korean takes two."""
    columns = "".join(f"{letter}\0" if east_asian_width(letter) in "WF" else letter for letter in text)
    return "\n".join(wrap(columns, 22, max_lines=4, placeholder=" ...")).replace("\0", "")


def _show(axes: Any, image: NDArray[np.uint8], correct: bool | None) -> None:
    """Shows ``image``; with a frame and a mark that is legible without colour where its verdict is known."""
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    colour = CORRECT if correct else WRONG
    for spine in axes.spines.values():
        spine.set(visible=correct is not None, linewidth=1.6, edgecolor=colour)
    if correct is not None:
        badge = {"boxstyle": "circle,pad=0.15", "facecolor": colour, "linewidth": 0}
        centred: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.97, 0.03, "✓" if correct else "✗", fontsize=5, color="white", bbox=badge, **centred)
