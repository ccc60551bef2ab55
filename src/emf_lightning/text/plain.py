"""Text as it comes from files, made fit for tokenizers and messages."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_MARKUP = re.compile(r"[<＜][^<>＜＞]*[>＞]|[\[［][^\[\]［］]*[\]］]")


def plain(text: str) -> str:
    """``text`` in valid Unicode, without a byte-order mark and white space around it."""
    return _valid(text).strip().lstrip("\ufeff").lstrip()


def prompt_texts(prompts: Any, argument: str = "prompt") -> list[str]:
    """One prompt or several from Python, in valid Unicode and without a byte-order mark, otherwise as they are.

    The empty string is the unconditional prompt.

    Raises:
        ValueError: for a prompt that is no text or holds NUL characters; the message begins with ``argument``.
    """
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(f"{argument}: {type(prompts).__name__} is no text; give a string, or a list of strings")
    texts = []
    for number, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"{argument}: number {number} is {type(prompt).__name__} ({shorten(repr(prompt), 40)}), no text; leave "
                "it out, or give '' for an image without a prompt"
            )
        if "\0" in prompt:
            raise ValueError(f"{argument}: number {number} holds NUL characters, so it is no text; remove them")
        texts.append(_valid(prompt).removeprefix("\ufeff"))
    return texts


def _valid(text: str) -> str:
    """``text``, with U+FFFD for halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def lines(text: str) -> list[str]:
    r"""The lines of ``text``, which end at ``\n`` or ``\r\n`` alone: JSON and prompts may hold other separators."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def parse_json(text: str | bytes) -> Any:
    """The value of JSON; numbers are floats however long, and a key given twice with different values is None.
    Raises ``ValueError`` for anything else, also for what is nested too deeply.
    """
    try:
        return json.loads(text, parse_int=float, object_pairs_hook=_unambiguous)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found.update({key: None for key, value in pairs if value != found[key]})
    return found


def shorten(text: str, length: int = 80) -> str:
    """``text`` for a message: its first ``length`` characters and its length, if it is longer."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The tokens of a transformers tokenizer that text could be taken for, such as ``</s>``, in one case and width."""
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    return frozenset(map(_fold, (*added, *getattr(tokenizer, "all_special_tokens", ()))))


def neutral(caption: str, tokens: Collection[str]) -> str:
    """``caption`` with a space in each text that a tokenizer would take for one of ``special_tokens``."""

    def broken(match: re.Match[str]) -> str:
        text = match[0]
        return f"{text[0]} {text[1:]}" if _fold(text) in tokens else text

    return _MARKUP.sub(broken, caption)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()
