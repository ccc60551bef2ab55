"""Measures an epoch's encoding with a transformers encoder, with a feature cache and without one.

The encoder has T5-small's size and random weights in a local folder. Writes into docs/performance.md;
`python -m benchmarks.cached_epoch --help` names the options.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.data_path import photograph, shard
from benchmarks.pages import MACHINE, rows, write_tables
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.pretrained import PretrainedTextEncoder

LENGTH, SIDE, BATCH = 64, 256, 16
WORDS = [f"word{number}" for number in range(1000)]


def save_encoder(folder: Path, layers: int = 6, width: int = 512) -> str:
    """A T5 with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=width, num_layers=layers, num_heads=8, d_ff=4 * width)
    T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


def save_samples(path: Path, count: int) -> str:
    """A shard of pictures with captions of 60 words, all different."""
    pictures = [photograph(number, (SIDE, SIDE)) for number in range(8)]
    members: dict[str, bytes] = {}
    for number in range(count):
        words = [WORDS[(number * 61 + at * at) % len(WORDS)] for at in range(59)]
        members |= {f"{number}.jpg": pictures[number % 8], f"{number}.txt": " ".join([*words, WORDS[number]]).encode()}
    return shard(path, members)


def epoch(encoder: PretrainedTextEncoder, samples: str, cache: FeatureCache | None) -> float:
    """CPU seconds a sample of one pass: reading, decoding, and encoding or looking up."""
    data = CaptionImageData(encoder, Pixels(), samples, cache=cache, resolution=SIDE, batch_size=BATCH, num_workers=0)
    data.setup("fit")
    began, count = time.process_time(), 0
    for batch in data.train_dataloader():
        count += len(data.encoder.encode(batch))
    return (time.process_time() - began) / count


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        encoder = PretrainedTextEncoder(save_encoder(Path(name, "encoder")), LENGTH)
        samples = save_samples(Path(name, "samples.tar"), options.samples)
        cache = FeatureCache(Path(name, "cache"), 1.0, "bfloat16")
        epoch(encoder, samples, None)  # warms up
        names = ("without a cache", "first epoch with a cache", "each further epoch")
        times = [epoch(encoder, samples, kept) for kept in (None, cache, cache)]
    cells = [[about, 1e3 * seconds, f"{times[0] / seconds:.2f}"] for about, seconds in zip(names, times, strict=True)]
    size = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    how = (
        f"`python -m benchmarks.cached_epoch`: T5EncoderModel, {size:.0f} M parameters, {LENGTH} tokens; "
        f"{options.samples} pictures of {SIDE} x {SIDE}; {MACHINE}."
    )
    write_tables(options.out, {"EPOCH": [how, "", *rows(["epoch", "CPU ms a sample", "times as fast"], cells)]})


if __name__ == "__main__":
    main()
