from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache_filling import CacheFiller
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.base import TextEncoder
from emf_lightning.text.blip3o_next import BLIP3oNext
from emf_lightning.text.words import WordEncoder
from tests.data.tars import SIDE, noise_image, write_tar
from tests.tiny_blip3o import SETTINGS, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> BLIP3oNext:
    return BLIP3oNext(str(save_checkpoint(tmp_path_factory.mktemp("blip3o"))), **SETTINGS)


@pytest.fixture
def shards(tmp_path) -> list[str]:
    paths = []
    for shard in range(3):
        members = {}
        for number in range(5 * shard, 5 * shard + 5):
            members |= {
                f"{number}.png": noise_image(number),
                f"{number}.txt": f"two ball and {number % 4} ring".encode(),
            }
        paths.append(write_tar(tmp_path / f"{shard}.tar", members))
    return paths


def make(text: TextEncoder, shards: list[str], folder: Path | None, **options) -> CaptionImageData:
    caches = {}
    if folder is not None:
        caches = {"cache": FeatureCache(folder / "f", 0.01), "latent_cache": LatentCache(folder / "l", 0.01)}
    options = {"batch_size": 4, "resolution": SIDE, "num_workers": 0, **caches, **options}
    return CaptionImageData(text, Pixels(), shards, **options)


def pairs(data: CaptionImageData) -> tuple[list[str], torch.Tensor]:
    """The captions and encoder images of the first batch in the shards' order."""
    stream = ShardStream(data.shards, SquareTransform(SIDE), data.batch_size, encoder_image_size=data.text.image_size)
    batch = next(iter(stream))
    return list(batch.captions), batch.encoder_images.float() / 127.5 - 1


def fill(data: CaptionImageData, rank: int = 0, ranks: int = 1) -> tuple[int, int]:
    *_, last = CacheFiller(data, CPU, rank, ranks).fill()
    return last.done, last.present


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_computes_nothing_after_filling(encoder, shards, tmp_path, num_workers):
    assert fill(make(encoder, shards, tmp_path, num_workers=num_workers)) == (15, 0)
    data = make(encoder, shards, tmp_path)
    data.setup("fit")
    expected = make(encoder, shards, None)
    expected.setup("fit")
    for raw, other in zip(data.train_dataloader(), expected.train_dataloader(), strict=True):
        assert raw.features.found.all() and raw.latents.found.all()
        batch, fresh = (d.on_after_batch_transfer(r, 0) for d, r in ((data, raw), (expected, other)))
        assert batch.captions == fresh.captions
        torch.testing.assert_close(batch.text.context, fresh.text.context, atol=1e-5, rtol=1e-4)
        assert torch.equal(batch.latents, fresh.latents)
    assert data.cache.fetch("") is not None  # the null caption


def test_ranks_share_the_work_and_a_second_call_finds_it_done(encoder, shards, tmp_path):
    done = [fill(make(encoder, shards, tmp_path), rank, 2)[0] for rank in range(2)]
    assert sum(done) == 15
    assert min(done) > 0
    assert fill(make(encoder, shards, tmp_path)) == (0, 15)


def test_captions_to_sample_from_are_counted_and_filled_as_well(encoder, shards, tmp_path):
    sampling = [f"one ball and {number} ring" for number in range(9)]

    def data() -> CaptionImageData:
        return make(WordEncoder(8), shards, tmp_path, sampling_captions=sampling)

    assert CacheFiller(data(), CPU).entries(15) == {"features": 24, "latents": 15}
    for rank in range(2):
        fill(data(), rank, 2)
    filled = data()
    filled.open_caches()
    assert all(filled.cache.fetch(filled.cache.key(caption)) is not None for caption in sampling)


def test_what_was_interrupted_goes_on(encoder, shards, tmp_path):
    running = CacheFiller(make(encoder, shards, tmp_path), CPU).fill()
    assert next(running).done == 4
    running.close()
    assert fill(make(encoder, shards, tmp_path)) == (11, 4)


def test_only_the_missing_kind_is_computed(encoder, shards, tmp_path):
    fill(make(encoder, shards, tmp_path, latent_cache=None))
    filling = CacheFiller(make(encoder, shards, tmp_path), CPU)
    *batches, _ = filling.stream
    assert all(batch.features.found.all() and not batch.latents.found.any() for batch in batches)
    assert all(len(batch.encoder_images) == 0 and len(batch.images) == len(batch) for batch in batches)
    assert fill(make(encoder, shards, tmp_path)) == (15, 0)


def test_captions_alone_need_no_image_to_be_decoded(shards, tmp_path):
    members = {"0.png": noise_image(0)[:50], "0.txt": b"a red cube"}  # corrupt: decoding it would leave it out
    data = make(WordEncoder(width=8, length=4), [write_tar(tmp_path / "x.tar", members)], tmp_path, latent_cache=None)
    assert fill(data) == (1, 0)
    assert data.cache.fetch("a red cube") is not None


def test_captions_without_images_have_a_size_as_well(tmp_path):
    shards = [write_tar(tmp_path / "x.tar", {"0.txt": b"a red cube", "1.txt": b"a blue ball"})]
    encoder = WordEncoder(width=8, length=4)
    data = make(encoder, shards, tmp_path, images=False, batch_size=2)  # whose latent cache has no use
    (option, *_) = CacheFiller(data, CPU).options(2)["features"]
    assert option.size > 0
    assert fill(data) == (2, 0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch.captions) == ["a blue ball", "a red cube"]
    with pytest.raises(ValueError, match=r"nothing to fill; set data.cache \(images: false has no latents\)"):
        CacheFiller(make(WordEncoder(width=8, length=4), shards, tmp_path, cache=None, images=False), CPU)


def test_other_limits_of_images_do_not_find_the_latents_of_images_beyond_them(tmp_path):
    members = {}
    for number in range(8):
        size = (SIDE, SIDE) if number % 2 else (10 * SIDE, SIDE)
        members |= {f"{number}.png": noise_image(number, size), f"{number}.txt": b"a ball"}
    shards = [write_tar(tmp_path / "x.tar", members)]

    def trained(**options) -> int:
        data = make(WordEncoder(width=8, length=4), shards, tmp_path, batch_size=2, **options)
        data.setup("fit")
        return sum(len(batch) for batch in data.train_dataloader())

    assert fill(make(WordEncoder(width=8, length=4), shards, tmp_path)) == (8, 0)
    assert trained() == 8
    assert trained(image_limits=ImageLimits(max_aspect_ratio=3)) == 4


def test_options_state_the_size_and_the_measured_error_of_each_dtype(encoder, shards, tmp_path):
    filling = CacheFiller(make(encoder, shards, tmp_path), CPU)
    assert filling.count() == 15
    options = filling.options(100_000)
    assert set(options) == {"features", "latents"}
    *_, pooled = options["features"]
    whole = encoder.encode_pairs(*pairs(filling.data)).context
    averaged = torch.cat([whole[:, :1], whole[:, 1:].mean(1, keepdim=True).expand(-1, 9, -1)], dim=1)
    assert pooled.token_pool == 3
    assert pooled.error == pytest.approx(float((averaged - whole).norm() / whole.norm()))
    assert pooled.size < 0.3 * options["features"][0].size
    for choices in (options["latents"], options["features"][:4]):
        errors = {choice.dtype: choice.error for choice in choices}
        assert errors["float32"] == 0
        assert 0 < errors["float16"] < errors["bfloat16"] < 0.004 < errors["float8"] < 0.05
        sizes = [choice.size for choice in choices]
        assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert options["latents"][0].size == filling.caches["latents"].size(100_000)


def test_the_published_size_is_what_it_is_said_to_be(tmp_path):
    cache = FeatureCache(tmp_path, max_gb=700, dtype="bfloat16")
    with pytest.warns(UserWarning, match="the disk of"):  # 700 GB are not to be had where tests run
        cache._open("published", 730, 2304)
    with pytest.raises(ValueError, match=r"too small: 170,000 samples x 3\.37 MB = 572 GB; free: .*float8"):
        cache.estimate(170_000)


def test_too_little_room_is_said_before_anything_is_encoded(encoder, shards, tmp_path):
    small = {"cache": FeatureCache(tmp_path / "c", 0.01), "latent_cache": LatentCache(tmp_path / "c", 0.01)}
    filling = CacheFiller(make(encoder, shards, None, **small), CPU)
    filling.check(1000)
    with pytest.raises(ValueError, match=r"the features would not fit: 30,000 samples x .*raise max_gb to"):
        filling.check(30_000)
    each = filling.caches["features"].size(1)
    with pytest.raises(ValueError, match=r"share .* and take .* together, the limit is 10 MB"):
        filling.check(int(0.95e7 / each))


def test_a_cache_that_fills_up_stops_with_a_sentence(encoder, shards, tmp_path):
    members = {}
    for number in range(2000):
        members |= {f"{number}.png": noise_image(1), f"{number}.txt": f"{number} ring".encode()}
    words = WordEncoder(width=64, length=4)
    data = make(words, [write_tar(tmp_path / "x.tar", members)], None, cache=FeatureCache(tmp_path / "c", 0.001))
    with pytest.warns(UserWarning, match="reached max_gb"), pytest.raises(ValueError, match="took no more at max_gb"):
        fill(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cache": None, "latent_cache": None}, "nothing to fill"), ({"flip": True}, "data.flip: mirrors images")],
)
def test_data_that_cannot_be_filled_ahead_say_why(encoder, shards, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheFiller(make(encoder, shards, tmp_path, **change), CPU)


def test_shards_without_a_usable_sample_are_named(encoder, tmp_path):
    data = make(encoder, [write_tar(tmp_path / "x.tar", {"0.png": noise_image(0)})], tmp_path)
    with pytest.raises(ValueError, match=r"data\.shards: no usable sample in 1 shards"):
        CacheFiller(data, CPU).options(1)


@pytest.mark.parametrize("kind", ["metadata of pictures", "lists in JSON"])
def test_captions_within_the_data_are_counted_as_entries(tmp_path, kind):
    counts = [1, 5, 2, 4] * 3
    captions = [[f"{n} ball and {k} ring" for k in range(count)] for n, count in enumerate(counts)]
    source = tmp_path / "pictures"
    source.mkdir()
    members = {f"{n}.png": noise_image(n) for n in range(12)} | {"odd.png": noise_image(0)}  # without a caption
    if kind == "lists in JSON":
        members |= {f"{n}.json": json.dumps({"caption": captions[n]}).encode() for n in range(12)}
        source = write_tar(tmp_path / "0.tar", dict(sorted(members.items())))
    else:
        for name, content in members.items():
            (source / name).write_bytes(content)
        rows = [{"file_name": f"{n}.png", "caption": captions[n]} for n in range(12)]
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    filling = CacheFiller(make(WordEncoder(width=8, length=4), str(source), tmp_path), CPU)
    assert filling.entries(filling.count())["features"] == round(13 * sum(counts) / 12)
    *_, last = filling.fill()
    assert last.done == sum(counts)
    small = CacheFiller(make(WordEncoder(width=8, length=4), str(source), tmp_path / "other"), CPU)
    needed = small.data.cache.size(sum(counts)) / 1e9
    small.data.cache.max_gb = needed / 2
    with pytest.raises(ValueError, match="max_gb"):
        small.check(small.count())


@pytest.fixture
def captioned(tmp_path) -> tuple[list[str], dict[str, object], int]:
    """Shards of 12 images, options with their captions in a file, and the number of captions."""
    shards = [
        write_tar(tmp_path / f"{shard}.tar", {f"{n}.png": noise_image(n) for n in range(shard * 6, shard * 6 + 6)})
        for shard in range(2)
    ]
    counts = [1, 5, 2, 3] * 3
    records = [{"image": f"{n}.png", "caption": f"{n} ball and {k} ring"} for n in range(12) for k in range(counts[n])]
    records += [{"image": "1.png", "caption": "1 ball and 0 ring"}, {"image": "1.png", "caption": None}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    return shards, {"captions": str(tmp_path / "c.jsonl")}, sum(counts)


@pytest.mark.parametrize("reads_images", [False, True])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_caption_of_an_image_is_cached_and_every_pass_of_training_finds_it(
    encoder, captioned, tmp_path, reads_images, seed
):
    shards, options, captions = captioned
    text = encoder if reads_images else WordEncoder(width=8, length=4)
    filling = CacheFiller(make(text, shards, tmp_path, batch_size=5, **options), CPU)
    assert filling.entries(filling.count()) == {"features": captions, "latents": 12}
    *_, last = filling.fill()
    assert (last.done, last.present, last.skipped) == (captions, 0, {})
    again = make(text, shards, tmp_path, **options)
    assert fill(again) == (0, captions)
    data = make(text, shards, tmp_path, seed=seed, **options)
    data.setup("fit")
    seen = set()
    for _ in range(5):
        for raw in data.train_dataloader():
            assert raw.features.found.all() and raw.latents.found.all()
            seen.update(data.on_after_batch_transfer(raw, 0).captions)
            data.train_dataloader().acknowledge(raw)
    assert len(seen) == captions
    assert data.cache.misses == data.latent_cache.misses == 0


def test_an_interrupted_call_goes_on_between_the_captions_of_an_image(captioned, tmp_path):
    shards, options, captions = captioned
    text = WordEncoder(width=8, length=4)
    running = CacheFiller(make(text, shards, tmp_path, **options), CPU).fill()
    assert next(running).done == 4
    running.close()
    done = [CacheFiller(make(text, shards, tmp_path, **options), CPU, rank, 2) for rank in range(2)]
    counts = [list(filling.fill())[-1] for filling in done]
    assert sum(count.done for count in counts) == captions - 4
    assert sum(count.present for count in counts) == 4


def test_latents_alone_are_computed_once_an_image(captioned, tmp_path):
    shards, options, _ = captioned
    assert fill(make(WordEncoder(width=8, length=4), shards, tmp_path, cache=None, **options)) == (12, 0)


def test_a_broken_image_with_several_captions_is_counted_once(captioned, tmp_path):
    shards, options, captions = captioned
    members = {f"{n}.png": noise_image(n)[:60] if n == 1 else noise_image(n) for n in range(6)}
    write_tar(tmp_path / "0.tar", members)
    *_, last = CacheFiller(make(WordEncoder(width=8, length=4), shards, tmp_path, **options), CPU).fill()
    assert (last.done, last.skipped) == (captions - 5, {"corrupt image": 1})
