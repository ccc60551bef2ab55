"""Parts of a batch, and captions whose features are not finite."""

from __future__ import annotations

import pytest
import torch

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.text.base import TextFeatures


def features(count: int, offset: float = 0.0) -> TextFeatures:
    context = offset + torch.arange(count * 6.0).view(count, 2, 3)
    return TextFeatures(context, torch.tensor([[True, False]]).repeat(count, 1))


@pytest.fixture
def batch() -> CaptionImageBatch:
    captions = ("a", "b", "c", "d", "e")
    return CaptionImageBatch(torch.randn(5, 1, 2, 2), features(5), features(1, 50.0), captions, features(5, 100.0))


def test_parts_hold_all_samples_once_with_their_sampling_captions(batch):
    parts = batch.parts(2)
    assert [len(part) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert sum((part.captions for part in parts), ()) == batch.captions
    for name in ("text", "sampling"):
        together = TextFeatures.cat([getattr(part, name) for part in parts])
        assert torch.equal(together.context, getattr(batch, name).context)
        assert torch.equal(together.mask, getattr(batch, name).mask)


def test_captions_without_finite_features_become_the_null_caption(batch):
    batch.text.context[1, 0, 2] = torch.nan
    batch.text.context[2, 1] = torch.inf  # padding, never read
    batch.sampling.context[3, 0, 0] = -torch.inf
    cleaned = batch.without_bad_features()
    assert cleaned.latents.isfinite().flatten(1).all(1).tolist() == [True, False, True, True, True]
    assert torch.equal(cleaned.text.context[1], batch.null.context[0])
    assert torch.equal(cleaned.sampling.context[3], batch.null.context[0])
    kept = [0, 1, 2, 4]
    assert torch.equal(cleaned.sampling.context[kept], batch.sampling.context[kept])


def test_a_batch_moves_with_all_of_its_features(batch):
    moved = batch.to("meta")
    tensors = (moved.latents, moved.text.context, moved.null.mask, moved.sampling.context, moved.sampling.mask)
    assert all(tensor.is_meta for tensor in tensors)
