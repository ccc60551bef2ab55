"""`emf encoders`: how discriminative and how disentangled text encoders are."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

import numpy as np
from tqdm import tqdm

import emf_lightning.text
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.dpg.dpg_bench import read_items
from emf_lightning.evaluation.encoders.controls import ConstantEncoder
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.encoders.report import EncoderStudy, StudiedEncoder
from emf_lightning.evaluation.encoders.study import (
    Features,
    check_retrieval,
    discriminability,
    disentanglement,
    pooled_features,
    truncations,
)
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.text.base import TextEncoder

for _module in iter_modules(emf_lightning.text.__path__, "emf_lightning.text."):
    import_module(_module.name)  # the parser resolves the short names of encoders that it can find


def encoders(
    encoders: dict[str, TextEncoder],
    corpus: PairCorpus | None = None,
    prompts: Path | None = None,
    out: Path = Path("encoders"),
    queries: int = 1000,
    k: int = 2,
    unit: Literal["word", "sentence"] = "word",
    fraction: float = 0.5,
    seeds: list[int] | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Study text encoders: captions retrieve captions, and lose parts of themselves; with controls beside them.

    Args:
        encoders: name -> encoder, e.g. in a file given with --config.
        corpus: caption-image pairs: ShapesPairs, the default, or CocoPairs with COCO's folder and a DINOv3.
        prompts: text file with a prompt a line to take parts from, or DPG-Bench's CSV file; by default the captions.
        out: directory for encoders.md, .json and .png, and retrieved.png; pooled features are kept there, too.
        queries: random captions that ask.
        k: captions that each retrieves.
        unit: what is removed from a prompt.
        fraction: share of the units that is removed.
        seeds: of the removals; 0, 1 and 2 by default.
        batch_size: captions encoded at once.
        device: of the encoders, cuda or cpu; by default the GPU where there is one.
    """
    if not encoders:
        raise ValueError("encoders: name at least one, e.g. --encoders.words WordEncoder")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    for name, value in (("queries", queries), ("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    began, pairs = time.perf_counter(), corpus or ShapesPairs()
    check_retrieval(pairs, k)
    of_dpg = prompts is not None and prompts.suffix.lower() == ".csv"
    asked = list(dict.fromkeys(_prompts(prompts, of_dpg) if prompts else pairs.captions))
    removed = seeds or [0, 1, 2]
    studied = []
    for name, encoder in {**encoders, "constant (control)": ConstantEncoder()}.items():
        encoder.to(device_of(device))
        with tqdm(desc=name, unit="text") as bar:

            def show(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            features, cut = _kept_features(out, encoder, pairs, batch_size, show)
            bar.reset()
            parts = disentanglement(encoder, asked, unit, fraction, removed, batch_size, show)
        studied.append(StudiedEncoder(name, discriminability(features, pairs, queries, k), parts, cut))
        encoder.to("cpu")
    about = {
        "corpus": pairs.name,
        "retrieval": f"{min(queries, len(pairs.captions)):,} queries, top {k}, own image and equal captions left out",
        "removal": f"{fraction:.0%} of the {unit}s of {len(asked):,} prompts, seeds {', '.join(map(str, removed))}",
        "took": f"{time.perf_counter() - began:.0f} s",
    }
    study = EncoderStudy(tuple(studied), about, papers_corpus=pairs.papers, papers_prompts=of_dpg)
    study.write(out, pairs)
    print(study.markdown())
    print(f"encoders.md, encoders.json, encoders.png and retrieved.png: {out}")


def _prompts(path: Path, of_dpg: bool) -> list[str]:
    return [item.text for item in read_items(path)] if of_dpg else PromptList(path).prompts


def _kept_features(
    out: Path, encoder: TextEncoder, corpus: PairCorpus, batch_size: int, report: Callable[[int, int], None]
) -> tuple[Features, float]:
    """Pooled features of the corpus's captions, and the share that was cut, from a file where an earlier call left it.

    The share is of different captions, NaN where the encoder does not count.
    """
    captions = hashlib.sha256("\n".join(corpus.captions).encode()).hexdigest()
    key = hashlib.sha256(f"{encoder.fingerprint} {encoder.variant} {captions}".encode()).hexdigest()
    path = out / "features" / f"{key[:16]}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = truncations(encoder)
        features = pooled_features(encoder, corpus.captions, batch_size, report)
        cut = (truncations(encoder) - before) / len(set(corpus.captions))
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, features=features, cut=cut)
        partial.replace(path)
    with np.load(path) as kept:
        return kept["features"], float(kept["cut"])
