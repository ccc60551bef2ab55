"""Built-in text encoder without weights: deterministic, discriminative, sensitive to word order."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from emf_lightning.text.base import TextEncoder, TextFeatures
from emf_lightning.text.plain import shorten

_WORD = re.compile(r"[a-z0-9]+")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
"""Kana and ideographs, which are written without spaces: each is a word."""


def words_of(caption: str) -> list[str]:
    """The words in lower case: runs of letters, their marks, and digits of any script."""
    if caption.isascii():
        return _WORD.findall(caption.lower())
    signs = "".join(" " if unicodedata.category(c) == "So" else c for c in caption)  # NFKC makes letters of some
    text = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", signs).lower())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    return [word for word in words if any(unicodedata.category(c)[0] in "LN" for c in word)]


class WordEncoder(TextEncoder):
    """A fixed random vector for each word, mixed with permuted vectors of its neighbours.

    Token i is ``sum_k decay^|k| P^k w(i + k) + position * p(i)`` over ``|k| <= window``, scaled to unit variance.
    w maps a word to a random direction (nearly orthogonal for different words, hence discriminative). P is a fixed
    permutation of the channels, so that "red" one word before is another direction than "red" two words before, and
    both can be read off linearly (random permutations as order vectors: Sahlgren et al., 2008). As in a language model,
    the noun's token then also contains its adjective.

    Args:
        width: D, channels of a token.
        length: L, number of words kept of a caption.
        window: number of neighbours to either side that a token contains; 0 with ``position`` 0 is a bag of words.
        decay: weight of a neighbour per word of distance.
        position: weight of the position vector p.
        shared: weight of one vector common to all tokens; > 0 makes features less discriminative (ablation for the
            claim of arXiv 2604.18168 that few-step training needs discriminative features).
        seed: of all random vectors.
    """

    truncated = 0

    def __init__(
        self,
        width: int = 128,
        length: int = 12,
        window: int = 4,
        decay: float = 0.8,
        position: float = 0.5,
        shared: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width < 8 or length < 1 or window < 0:
            sizes = f"{width}, {length}, {window}"
            raise ValueError(f"WordEncoder: needs width >= 8, length >= 1, window >= 0; got {sizes}")
        self.width, self.length, self.window = width, length, window
        self.decay, self.position, self.shared, self.seed = decay, position, shared, seed
        self._vectors: dict[str, torch.Tensor] = {}
        order = torch.from_numpy(self._generator("permutation").permutation(width))
        self._forward_shifts = [torch.arange(width)]
        for _ in range(max(window, 1)):
            self._forward_shifts.append(self._forward_shifts[-1][order])
        self._backward_shifts = [torch.argsort(shift) for shift in self._forward_shifts]
        self.device_marker = torch.nn.Buffer(torch.empty(0), persistent=False)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        settings = (self.width, self.length, self.window, self.decay, self.position, self.shared, self.seed)
        return hashlib.sha256(f"{type(self).__name__} 2 {settings}".encode()).hexdigest()

    def _generator(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest[:16], np.uint64))

    def _vector(self, name: str) -> torch.Tensor:
        """Random vector ``[D]`` of unit variance for ``name``."""
        if name not in self._vectors:
            self._vectors[name] = torch.from_numpy(self._generator(name).standard_normal(self.width, np.float32))
        return self._vectors[name]

    def _tokens(self, caption: str) -> torch.Tensor:
        """Tokens ``[words, D]``; the null caption is one token of its own."""
        words = words_of(caption)
        self.truncated += len(words) > self.length
        if len(words) > self.length and self.truncated == 1:
            warnings.warn(
                f"WordEncoder: a caption of {len(words)} words is cut to length {self.length}: {shorten(caption)!r}; "
                "raise `length` (counted from here on in `truncated`)",
                stacklevel=2,
            )
        words = words[: self.length]
        base = torch.stack([self._vector(f"word {word}") for word in words] or [self._vector("null")])
        tokens = base.clone()
        for k in range(1, self.window + 1):
            tokens[k:] += self.decay**k * base[:-k][:, self._backward_shifts[k]]
            tokens[:-k] += self.decay**k * base[k:][:, self._forward_shifts[k]]
        tokens += self.position * torch.stack([self._vector(f"position {i}") for i in range(len(base))])
        tokens /= tokens.std(dim=1, keepdim=True)
        return tokens + self.shared * self._vector("shared")

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]`` of the words, see ``words_of``."""
        context = torch.zeros(len(captions), self.length, self.width)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            tokens = self._tokens(caption)
            context[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return TextFeatures(context, mask).to(self.device_marker.device)
