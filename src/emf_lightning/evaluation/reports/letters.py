"""Letters in figures: from other fonts of this machine where the figure's own lacks them, else as code points."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawable(text: str) -> str:
    r"""``text``, with an escape such as ``\u4e2d`` for each letter that no font of this machine has."""
    fonts = _fonts_of(_missing(text))
    lost = {ord(letter): letter.encode("unicode_escape").decode() for letter in _missing(text) - fonts.keys()}
    return text.translate(lost)


def use_fonts_of_machine(figure: Figure) -> None:
    """Makes every text of ``figure`` ``drawable``, and gives it the fonts that have its letters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if missing := _missing(text.get_text()):
            text.set_text(drawable(text.get_text()))
            text.set_fontfamily([*text.get_fontfamily(), *dict.fromkeys(_fonts_of(missing).values())])


def _missing(text: str) -> frozenset[str]:
    """The letters that the usual font lacks."""
    return frozenset(letter for letter in text if letter != "\n" and not letter.isascii() and not _is_usual(letter))


@cache
def _is_usual(letter: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return bool(get_font(findfont(FontProperties(family=["sans-serif"]))).get_char_index(ord(letter)))


@cache
def _fonts_of(letters: frozenset[str]) -> dict[str, str]:
    """Letter -> family of a font that has it; letters that none has are left out."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    found: dict[str, str] = {}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.style != "normal", entry.weight != 400)):
        if len(found) == len(letters):
            break
        if entry.name.startswith("Last Resort"):  # boxes with the name of the script
            continue
        try:
            font = FT2Font(entry.fname)
            font.set_size(8, 72)  # fails for pictures in place of outlines, which cannot be drawn
            has = [letter for letter in letters - found.keys() if font.get_char_index(ord(letter))]
        except (OSError, RuntimeError):
            continue
        found |= dict.fromkeys(has, entry.name)
    return found
