"""Features made from a caption and its image, and latents, through shards, workers and caches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform, decode_image, stretch_to_square
from emf_lightning.data.reading.tar_samples import TarSample
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.base import TextFeatures
from emf_lightning.text.blip3o_next import BLIP3oNext
from tests.data.tars import SIDE, noise_image, write_tar
from tests.tiny_blip3o import SETTINGS, save_checkpoint
from tests.tiny_blip3o import SIDE as VIEW

CAPTIONS = ["a red cube", "two blue ball on a ring", "a red cube", "a photo of a green ring"]
"""Two images of one caption among them."""


class CountingBLIP3o(BLIP3oNext):
    """The encoder, counting the pairs that it encodes."""

    pairs = 0

    def encode_pairs(self, captions: Sequence[str], images: Tensor) -> TextFeatures:
        self.pairs += len(captions)
        return super().encode_pairs(captions, images)


class CountingPixels(Pixels):
    images = 0

    def encode(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return super().encode(images)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> CountingBLIP3o:
    folder = str(save_checkpoint(tmp_path_factory.mktemp("blip3o")))
    encoder = CountingBLIP3o(folder, **SETTINGS)
    encoder.pretrained = folder
    return encoder


@pytest.fixture
def shard(tmp_path) -> str:
    members = {}
    for number, caption in enumerate(CAPTIONS):
        members |= {f"{number}.png": noise_image(number, (30 - number, 20)), f"{number}.txt": caption.encode()}
    return write_tar(tmp_path / "x.tar", members)


def make(encoder, shard, num_workers=0, **options) -> CaptionImageData:
    encoder.pairs = 0
    options = {"batch_size": 4, "shuffle_block": 1, "resolution": SIDE, **options}
    data = CaptionImageData(encoder, CountingPixels(), shard, num_workers=num_workers, **options)
    data.setup("fit")
    return data


def encoded(data: CaptionImageData) -> list[CaptionImageBatch]:
    batches, loader = [], data.train_dataloader()
    for raw in loader:
        loader.acknowledge(raw)  # the next call goes on with the next pass
        batches.append(data.on_after_batch_transfer(raw, 0))
    return batches


def expected(encoder, flipped: bool = False) -> tuple[Tensor, Tensor]:
    """Features and latents of the shard's samples."""
    images = [decode_image(TarSample("", 0, 0, noise_image(n, (30 - n, 20)))) for n in range(len(CAPTIONS))]
    whole = torch.stack([torch.from_numpy(stretch_to_square(image, VIEW)) for image in images])
    squares = torch.stack([torch.from_numpy(SquareTransform(SIDE)(image)) for image in images])
    if flipped:
        whole, squares = whole.flip(2), squares.flip(2)
    features = BLIP3oNext.encode_pairs(encoder, CAPTIONS, whole.permute(0, 3, 1, 2).float() / 127.5 - 1)
    return features.context, squares.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_training_features_are_those_of_the_whole_image_and_latents_of_its_square(encoder, shard):
    (batch,) = encoded(make(encoder, shard))
    context, latents = expected(encoder)
    torch.testing.assert_close(batch.text.context, context, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch.latents, latents)
    assert not torch.equal(context[0], context[2])  # one caption, two images
    assert torch.equal(batch.null.context, encoder([""]).context)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_second_pass_decodes_and_encodes_nothing(encoder, shard, tmp_path, num_workers):
    caches = {"cache": FeatureCache(tmp_path / "c", 0.01), "latent_cache": LatentCache(tmp_path / "c", 0.01)}
    data = make(encoder, shard, num_workers, **caches)
    (first,) = encoded(data)
    assert (encoder.pairs, data.autoencoder.images) == (4, 4)
    (raw,) = data.train_dataloader()
    assert raw.features.found.all() and raw.latents.found.all()
    assert len(raw.images) == len(raw.encoder_images) == 0
    second = data.on_after_batch_transfer(raw, 0)
    assert (encoder.pairs, data.autoencoder.images) == (4, 4)
    assert torch.equal(second.text.context, first.text.context)
    assert torch.equal(second.latents, first.latents)
    assert second.captions == first.captions
    context, latents = expected(encoder)
    torch.testing.assert_close(second.text.context, context, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.latents, latents)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_batch_that_is_half_cached_is_in_order_and_rounded_alike(encoder, shard, tmp_path, dtype):
    def caches() -> dict:
        return {"cache": FeatureCache(tmp_path / "f", 0.01, dtype), "latent_cache": LatentCache(tmp_path / "l", 0.01)}

    half: dict[str, bytes] = {}
    for number in (1, 3):
        half |= {f"{number}.png": noise_image(number, (30 - number, 20)), f"{number}.txt": CAPTIONS[number].encode()}
    (tmp_path / "half").mkdir()
    whole = encoded(make(encoder, shard, **caches()))[0]
    fresh = {"cache": FeatureCache(tmp_path / "g", 0.01, dtype), "latent_cache": LatentCache(tmp_path / "m", 0.01)}
    encoded(make(encoder, write_tar(tmp_path / "half/y.tar", half), **fresh, batch_size=2))
    data = make(encoder, shard, **fresh)
    (raw,) = data.train_dataloader()
    assert raw.features.found.tolist() == raw.latents.found.tolist() == [False, True, False, True]
    assert (len(raw.images), len(raw.encoder_images)) == (2, 2)
    batch = data.on_after_batch_transfer(raw, 0)
    torch.testing.assert_close(batch.text.context, whole.text.context, atol=1e-5, rtol=1e-4)
    assert torch.equal(batch.latents, whole.latents)


def test_parts_that_the_caches_spare_stay_where_they_are(encoder, shard, tmp_path):
    caches = {"cache": FeatureCache(tmp_path / "c", 0.01), "latent_cache": LatentCache(tmp_path / "c", 0.01)}
    encoded(make(encoder, shard, **caches))
    data = make(encoder, shard, **caches)
    (raw,) = data.train_dataloader()
    data.encoder.device = torch.device("meta")  # a part that moved there would lose its weights
    data.encoder.latents(raw), data.encoder.features(raw), data.text_features([""])
    assert next(data.text.parameters()).device.type == "cpu"


def test_mirrored_images_have_entries_of_their_own(encoder, shard, tmp_path):
    caches = {"cache": FeatureCache(tmp_path / "c", 0.01), "latent_cache": LatentCache(tmp_path / "c", 0.01)}
    plain, mirrored = expected(encoder), expected(encoder, flipped=True)
    data = make(encoder, shard, **caches, flip=True)
    seen = set()
    for _ in range(6):
        (batch,) = encoded(data)
        for row in range(4):
            turned = torch.equal(batch.latents[row], mirrored[1][row])
            features, latents = (mirrored if turned else plain)[0][row], (mirrored if turned else plain)[1][row]
            assert torch.equal(batch.latents[row], latents)
            torch.testing.assert_close(batch.text.context[row], features, atol=1e-5, rtol=1e-4)
            seen.add((row, turned))
    assert 4 < len(seen) == encoder.pairs == data.autoencoder.images


def test_tokens_of_prompts_are_generated_once_and_cached_beside_the_pairs(encoder, shard, tmp_path):
    data = make(encoder, shard, cache=FeatureCache(tmp_path / "c", 0.01))
    encoded(data)
    written = data.text_features(CAPTIONS)
    assert torch.equal(written.context[0], written.context[2])
    torch.testing.assert_close(written.context, encoder(CAPTIONS).context, atol=1e-5, rtol=1e-4)
    hits = data.cache.hits
    assert torch.equal(data.text_features(CAPTIONS).context, written.context)
    assert data.cache.hits == hits + 3


def test_another_token_seed_reuses_training_features_and_generates_other_tokens(encoder, shard, tmp_path):
    encoded(make(encoder, shard, cache=FeatureCache(tmp_path / "c", 0.01)))
    other = CountingBLIP3o(encoder.pretrained, **SETTINGS, seed=1)
    first = make(encoder, shard, cache=FeatureCache(tmp_path / "c", 0.01)).text_features(CAPTIONS).context
    data = make(other, shard, cache=FeatureCache(tmp_path / "c", 0.01))
    encoded(data)
    assert other.pairs == 0
    written = data.text_features(CAPTIONS).context
    torch.testing.assert_close(written, other(CAPTIONS).context, atol=1e-5, rtol=1e-4)
    assert not torch.equal(written, first)
    assert torch.equal(data.null_features().context, encoder([""]).context)
    assert data.cache.misses == len(set(CAPTIONS))


def test_an_image_without_a_caption_or_a_corrupt_one_is_left_out_with_caches_too(encoder, tmp_path):
    members = {
        "0.png": noise_image(0),
        "0.txt": b"a red cube",
        "1.png": noise_image(1)[:90],
        "1.txt": b"ring",
        "2.txt": b"cube",
    }
    caches = {"cache": FeatureCache(tmp_path / "c", 0.01), "latent_cache": LatentCache(tmp_path / "c", 0.01)}
    data = make(encoder, write_tar(tmp_path / "x.tar", members), **caches, batch_size=1)
    with pytest.warns(UserWarning, match="left out"):
        passes = [encoded(data), encoded(data)]
    assert [[batch.captions for batch in batches] for batches in passes] == [[("a red cube",)]] * 2


def test_sizes_follow_the_encoder(encoder, shard):
    data = make(encoder, shard)
    assert (data.context_width, data.context_length) == (encoder.width, encoder.length)
    with Image.new("RGB", (4, 4)) as image:
        assert stretch_to_square(image, data.text.image_size).shape == (VIEW, VIEW, 3)
