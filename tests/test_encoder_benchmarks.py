"""The benchmarks of caches and encoders measure what they say they measure."""

from __future__ import annotations

import torch

from benchmarks import feature_cache, token_sampling


def test_writing_tokens_is_measured_beside_reading_them():
    size, cpu = token_sampling.SIZES["tiny"], torch.device("cpu")
    found = list(token_sampling.measure(size, cpu, [1, 2], compiled=False, repeats=1))
    assert [(each.what, each.rows) for each in found] == [
        (what, rows) for rows in (1, 2) for what in ("tokens written", "images tokenized", "tokens read")
    ]
    assert all(each.seconds > 0 for each in found)
    text = token_sampling.report(size, cpu, found)
    assert "| | batch of 1 | batch of 2 |" in text
    assert f"| tokens written | {found[0].seconds:.3g} | {found[3].seconds / 2:.3g} |" in text


def test_the_small_encoder_is_a_twentieth_of_the_published_one_in_the_same_form():
    with torch.device("meta"):
        full, small = (
            token_sampling.make_encoder(token_sampling.SIZES[name], torch.device("meta"), torch.float32, False)
            for name in ("full", "small")
        )
    layers = [sum(p.numel() for p in part.language.model.layers.parameters()) for part in (full, small)]
    assert 15 < layers[0] / layers[1] < 60
    assert (small.length, small.codes) == (full.length, full.codes) == (730, 65_536)


def test_all_that_was_written_is_read(tmp_path):
    found = list(feature_cache.measure(tmp_path, samples=2, readers=[1]))
    assert [each.dtype for each in found] == ["float32", "bfloat16", "float16", "float8"]
    assert [round(each.bytes_each / 1e6, 1) for each in found] == [6.7, 3.4, 3.4, 1.7]
    assert found[0].error == 0 < found[3].error < 0.04
    assert not list(tmp_path.iterdir())
    assert "| bfloat16 | 3.37 MB | 572 GB | 0.17% |" in feature_cache.report(found, 2)
