"""`emf encoders`: discriminability and disentanglement of text encoders."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.trainings import check_seeds
from emf_lightning.data.prompt_list import PromptList
from emf_lightning.evaluation.devices import device_of
from emf_lightning.evaluation.encoders.controls import ConstantEncoder
from emf_lightning.evaluation.encoders.discriminability import check_retrieval, discriminability
from emf_lightning.evaluation.encoders.disentanglement import disentanglement
from emf_lightning.evaluation.encoders.features import Features, pooled_features, truncations
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.encoders.report import EncoderStudy, StudiedEncoder
from emf_lightning.evaluation.shapes.pairs import ShapesPairs
from emf_lightning.files import replacing
from emf_lightning.text.base import TextEncoder

import_classes("evaluation.encoders", "text")


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
    """Measure discriminability and disentanglement of text encoders, with controls.

    Args:
        encoders: name -> encoder, e.g. in a file given with --config.
        corpus: caption-image pairs: OwnPairs of your own data, ShapesPairs, the default, or CocoPairs with DINOv3.
        prompts: prompts of the removals: text file with a prompt a line, or DPG-Bench's CSV file; by default the
            captions.
        out: directory of encoders.md, .json and .png, of retrieved.png and of the cached pooled features.
        queries: number of random captions that retrieve others.
        k: captions retrieved for each query.
        unit: part of a prompt that is removed: word or sentence.
        fraction: share of the units that is removed.
        seeds: seeds of the removals; 0, 1 and 2 by default.
        batch_size: captions encoded at once.
        device: device of the encoders, cuda or cpu; by default the GPU where there is one.
    """
    if not encoders:
        raise ValueError("encoders: name at least one, e.g. --encoders.words WordEncoder")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    for name, value in (("queries", queries), ("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    removed, place = seeds or [0, 1, 2], device_of(device)
    check_seeds(removed)
    began, pairs = time.perf_counter(), corpus or ShapesPairs()
    check_retrieval(pairs, k)
    of_dpg = prompts is not None and prompts.suffix.lower() == ".csv"
    texts = pairs.captions
    if prompts is not None:
        from emf_lightning.evaluation.dpg.dpg_bench import read_items  # here: it loads torchmetrics

        texts = [item.text for item in read_items(prompts)] if of_dpg else PromptList(prompts).prompts
    asked = list(dict.fromkeys(texts))
    studied = []
    for name, encoder in {**encoders, "constant (control)": ConstantEncoder()}.items():
        encoder.to(place)
        with tqdm(desc=name, unit="text") as bar:

            def show(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            features, cut = _cached_features(out, encoder, pairs, batch_size, show)
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
    study = EncoderStudy(tuple(studied), about, paper_corpus=pairs.matches_paper, paper_prompts=of_dpg)
    study.write(out, pairs)
    print(study.table())
    print(f"\nencoders.md, with intervals and an explanation, encoders.json, encoders.png, retrieved.png: {out}")


def _cached_features(
    out: Path, encoder: TextEncoder, corpus: PairCorpus, batch_size: int, on_progress: Callable[[int, int], None]
) -> tuple[Features, float]:
    """Pooled features of the corpus's captions, and the share of captions that the encoder truncated.

    An earlier call's file is read. The share is NaN where the encoder does not count truncations.
    """
    captions = hashlib.sha256("\n".join(corpus.captions).encode()).hexdigest()
    key = hashlib.sha256(f"{encoder.fingerprint} {encoder.variant} {captions}".encode()).hexdigest()
    path = out / "features" / f"{key[:16]}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = truncations(encoder)
        features = pooled_features(encoder, corpus.captions, batch_size, on_progress)
        cut = (truncations(encoder) - before) / len(set(corpus.captions))
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, features=features, cut=cut)
    with np.load(path) as cached:
        return cached["features"], float(cached["cut"])
