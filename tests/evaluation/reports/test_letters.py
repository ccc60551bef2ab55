"""Letters that matplotlib's own font lacks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from emf_lightning.evaluation.reports.contact_sheet import contact_sheet
from emf_lightning.evaluation.reports.figures import save_figure
from emf_lightning.evaluation.reports.letters import _fonts_of, drawable

LOST, OWN = "\U000ffff0", "\uf8f0"
"""Letters for private use: no font has the first, a font of this test the second."""


@pytest.fixture
def font(tmp_path: Path) -> Iterator[Path]:
    """A font of the machine with one letter, a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(OWN): "square", ord("中"): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    known = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "squares.ttf")
    _fonts_of.cache_clear()
    yield tmp_path / "squares.ttf"
    fontManager.ttflist[:] = known
    _fonts_of.cache_clear()


def picture(text: str, path: Path) -> np.ndarray:
    figure = Figure(figsize=(2, 0.5))
    figure.text(0, 0.2, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that are missing
        save_figure(figure, path)
    return np.asarray(Image.open(path).convert("L"))


def test_a_letter_of_another_font_of_the_machine_is_drawn(font: Path, tmp_path: Path) -> None:
    assert drawable(f"a {OWN}") == f"a {OWN}"
    row = picture(f"a {OWN}{OWN}", tmp_path / "a.png").min(axis=0) < 50
    assert row.sum() > 2 * picture("a ", tmp_path / "b.png").shape[1] / 20, "two full squares"


@pytest.mark.parametrize("letter", [LOST, "\u2029", "\ufe0f"])
def test_a_letter_that_no_font_has_is_its_code_point(letter: str, tmp_path: Path) -> None:
    text = letter.encode("unicode_escape").decode()
    assert drawable(f"ä {LOST}\nω") == f"ä {LOST.encode('unicode_escape').decode()}\nω"
    if drawable(letter) != letter:
        assert np.array_equal(picture(f"a {letter}", tmp_path / "a.png"), picture(f"a {text}", tmp_path / "b.png"))


def test_a_damaged_font_is_passed_over(font: Path, tmp_path: Path) -> None:
    font.write_bytes(b"no font")
    assert drawable(OWN) == r"\uf8f0"


def test_wide_letters_take_two_columns_of_the_contact_sheet(font: Path, tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    figure = contact_sheet(["中" * 100, f"{LOST} fox"], {"1 step": images})
    wide, escaped = [text.get_text() for text in figure.texts if text.get_text() != "1 step"]
    assert [len(line) for line in wide.split("\n")][:3] == [11, 11, 11]
    assert escaped == r"\U000ffff0 fox"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "sheet.png")
