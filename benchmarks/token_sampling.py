"""Measures how long BLIP3o-NEXT takes to condition: tokenizing images, reading tokens (training), writing them.

Weights are random: time does not depend on them. Writes docs/results/token_sampling.md; `python -m
benchmarks.token_sampling --help` names the options.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emf_lightning.pretrained.files import config_of
from emf_lightning.text.blip3o_next import BLIP3oNext
from emf_lightning.text.blip3o_parts import make_connector
from emf_lightning.text.ta_tok import TextAlignedTokenizer

PROMPT = 64
"""Tokens of a prompt: the chat around it and some thirty of a caption."""


@dataclass(frozen=True)
class Size:
    """A language model, in Transformers' words, and an image tokenizer.

    Attributes:
        name: heading.
        language: changes to the published configuration.
        vision: likewise.
        context: width of the connector's output.
        image_size: side of the images, which are cut into patches of 14.
    """

    name: str
    language: dict[str, int]
    vision: dict[str, int]
    context: int
    image_size: int = 384


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIZES = {
    "full": Size("BLIP3o-NEXT: Qwen3-1.7B, SigLIP2 so400m, 729 tokens", {}, {}, 2304),
    "small": Size(
        "a twentieth: Qwen3 of width 512 and 8 layers, SigLIP2 of width 288 and 6, 729 tokens",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        {"hidden_size": 288, "intermediate_size": 1076, "num_hidden_layers": 6, "num_attention_heads": 4},
        576,
    ),
    "tiny": Size(
        "for the test",
        {
            "vocab_size": 400,
            "num_image_tokens": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        20,
        image_size=42,
    ),
}


class _Prompts:
    """In a tokenizer's place: prompts of one length."""

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[Any]]:
        if isinstance(texts, str):
            return {"input_ids": [5, 6, 7]}
        return {"input_ids": [list(range(1, PROMPT - 4)) for _ in texts]}


def make_encoder(size: Size, device: torch.device, dtype: torch.dtype, compiled: bool) -> BLIP3oNext:
    """An encoder of ``size`` with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig

    with torch.device("meta"):
        encoder = BLIP3oNext("BLIP3o/BLIP3o-NEXT-SFT-3B", compiled=compiled)
    config = config_of("BLIP3o/BLIP3o-NEXT-SFT-3B") | size.language
    vision = SiglipVisionConfig(**SO400M | size.vision, image_size=size.image_size, patch_size=14)
    with torch.device(device):
        encoder.language = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"}))
        encoder.images = TextAlignedTokenizer(vision, config["num_image_tokens"], vision.hidden_size)
        encoder.connector = make_connector(config["hidden_size"], size.context)
    encoder.tokenizer = _Prompts()
    encoder.codes = config["num_image_tokens"]
    encoder.first_code = config["vocab_size"] - encoder.codes
    encoder.opening = [8, 9]
    encoder.length = 1 + encoder.images.tokens
    encoder.width = size.context
    encoder.image_size = size.image_size
    encoder.freeze()
    return encoder.to(dtype)


@dataclass(frozen=True)
class Measured:
    """Seconds that one call took for ``rows`` images."""

    what: str
    rows: int
    seconds: float


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The least of ``repeats`` calls after one that warms up; the least, because others disturb and never help."""
    best = float("inf")
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            best = min(best, time.perf_counter() - began)
    return best


def measure(
    size: Size, device: torch.device, batches: Sequence[int], compiled: bool, repeats: int
) -> Iterator[Measured]:
    """Each way at each batch size."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for fixed in (False, True)[: 1 + compiled]:
        encoder = make_encoder(size, device, dtype, fixed)
        for rows in batches:
            captions = [str(row) for row in range(rows)]
            views = torch.rand(rows, 3, size.image_size, size.image_size, device=device) * 2 - 1
            codes = torch.randint(encoder.codes, (rows, encoder.length - 1), device=device)
            calls = {"tokens written, compiled" if fixed else "tokens written": partial(encoder.generate, captions)}
            if not fixed:
                calls["images tokenized"] = partial(encoder.images, views)
                calls["tokens read"] = partial(encoder.hidden_states, captions, codes)
            for what, call in calls.items():
                yield Measured(what, rows, seconds(call, device, repeats))


def report(size: Size, device: torch.device, found: Sequence[Measured]) -> str:
    """A table of seconds an image, in Markdown."""
    batches = list(dict.fromkeys(each.rows for each in found))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# What conditioning on BLIP3o-NEXT takes",
        "",
        f"Seconds an image; {size.name}; random weights; {name}; torch {torch.__version__}.",
        "`python -m benchmarks.token_sampling` writes this file.",
        "",
        "| | " + " | ".join(f"batch of {rows}" for rows in batches) + " |",
        "|---|" + "---:|" * len(batches),
    ]
    for what in dict.fromkeys(each.what for each in found):
        cells = {each.rows: f"{each.seconds / each.rows:.3g}" for each in found if each.what == what}
        lines.append(f"| {what} | " + " | ".join(cells.get(rows, "") for rows in batches) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full" if device.type == "cuda" else "small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also the compiled step over a fixed cache")
    parser.add_argument("--out", type=Path, default=Path("docs/results/token_sampling.md"))
    options = parser.parse_args()
    found = []
    for each in measure(SIZES[options.size], device, options.batches, options.compiled, options.repeats):
        print(f"{each.what:<26} {each.rows:>3} images {each.seconds:8.3g} s", flush=True)
        found.append(each)
    options.out.write_text(report(SIZES[options.size], device, found))
    print(options.out)


if __name__ == "__main__":
    main()
