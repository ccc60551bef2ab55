from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.batch_encoder import BatchEncoder
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.raw_batch import RawBatch
from emf_lightning.latents.base import Autoencoder
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar


class CountingEncoder(WordEncoder):
    """The built-in encoder, recording the captions that it encodes."""

    def __init__(self) -> None:
        super().__init__(width=8, length=4)
        self.asked: list[str] = []

    def encode(self, captions: Sequence[str]):  # type: ignore[no-untyped-def]
        self.asked += captions
        return super().encode(captions)


class Halving(Autoencoder):
    channels = 12
    downsampling = 2

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(latents, 2)


class Model(LightningModule):
    """The smallest model that trains, recording its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen: list[tuple[int, tuple[str, ...], str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> Tensor:
        digest = hashlib.sha256(batch.latents.numpy().tobytes() + batch.text.context.numpy().tobytes()).hexdigest()
        self.seen.append((self.current_epoch, batch.captions, digest))
        return self.layer(batch.latents.mean(dim=(2, 3))).mean()

    def validation_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
        self.validated += batch.captions

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> tuple[Tensor, list[str]]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def make(shards: str | list[str], num_workers: int = 0, **options: object) -> CaptionImageData:
    options = {"batch_size": 4, "shuffle_block": 8, "resolution": SIDE, **options}
    return CaptionImageData(CountingEncoder(), Pixels(), shards, num_workers=num_workers, **options)  # type: ignore[arg-type]


def trainer(folder: Path, **options: object) -> Trainer:
    options = {"max_epochs": 2, "enable_checkpointing": False, "devices": 1, **options}
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_resumes_at_any_step_with_the_very_next_batch(tmp_path: Path, num_workers: int) -> None:
    shards = write_numbered(tmp_path / "shards", [13, 7, 13])
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    model = Model()
    trainer(tmp_path, callbacks=[every_step], enable_checkpointing=True).fit(model, make(shards, num_workers))
    assert len(model.seen) >= 14
    assert [epoch for epoch, _, _ in model.seen] == sorted(epoch for epoch, _, _ in model.seen)
    per_pass = len(model.seen) // 2
    for step in (3, per_pass, per_pass + 2):
        resumed = Model()
        trainer(tmp_path).fit(resumed, make(shards, num_workers), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert resumed.seen == model.seen[step:]


def test_each_training_batch_gets_captions_to_sample_from_the_same_ones_after_a_resume(tmp_path: Path) -> None:
    class Watching(Model):
        def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> Tensor:
            assert batch.sampling is not None
            self.sampled = [*getattr(self, "sampled", []), batch.sampling.context.clone()]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: CaptionImageBatch, batch_idx: int) -> None:
            assert batch.sampling is None

    shards = write_numbered(tmp_path / "shards", [16])
    (tmp_path / "captions.txt").write_text("a\nb c\n\nd\n")
    options = {"sampling_captions": str(tmp_path / "captions.txt"), "validation_shards": shards}
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    model, resumed = Watching(), Watching()
    trainer(tmp_path, callbacks=[every_step], enable_checkpointing=True).fit(model, make(shards, **options))
    trainer(tmp_path).fit(resumed, make(shards, **options), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert len(model.sampled) == 8
    assert all(torch.equal(a, b) for a, b in zip(model.sampled[3:], resumed.sampled, strict=True))
    rows = torch.cat(model.sampled)
    known = CountingEncoder().encode(["a", "b c", "d"]).context
    counts = [int((rows == each).flatten(1).all(1).sum()) for each in known]
    assert sum(counts) == len(rows) == 32
    assert min(counts) >= 4, "each is drawn as often as the others"


def test_batches_of_one_caption_draw_other_captions_at_each_step(tmp_path: Path) -> None:
    class Watching(Model):
        def training_step(self, batch: CaptionImageBatch, batch_idx: int) -> Tensor:
            assert batch.sampling is not None
            drawn.append(batch.sampling.context.flatten(1))
            return super().training_step(batch, batch_idx)

    drawn: list[Tensor] = []
    members = {}
    for number in range(16):
        members |= {f"{number:06d}.png": noise_image(number), f"{number:06d}.txt": b"a photo of sks dog"}
    captions = [f"caption {number}" for number in range(100)]
    trainer(tmp_path).fit(Watching(), make(write_tar(tmp_path / "0.tar", members), sampling_captions=captions))
    assert len(drawn) == 8
    assert len(torch.cat(drawn).unique(dim=0)) > 16, "32 of 100 captions, and not the same four at each step"


def test_captions_to_sample_from_that_are_not_there_are_named(tmp_path: Path) -> None:
    data = make(write_numbered(tmp_path / "shards", [16]), sampling_captions=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"sampling_captions: cannot read '.*none\.txt'"):
        data.setup("fit")


def test_resume_between_two_passes_does_not_repeat_the_first_ones_order(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "shards", [16])
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    model = Model()
    trainer(tmp_path, callbacks=[every_epoch], enable_checkpointing=True).fit(model, make(shards))
    resumed = Model()
    trainer(tmp_path).fit(resumed, make(shards), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.seen == model.seen[4:]
    assert [seen[1] for seen in model.seen[4:]] != [seen[1] for seen in model.seen[:4]]


def test_limited_epochs_go_on_in_the_pass_instead_of_repeating_its_beginning(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "shards", [24])
    model = Model()
    trainer(tmp_path, limit_train_batches=3).fit(model, make(shards))
    assert [epoch for epoch, _, _ in model.seen] == [0, 0, 0, 1, 1, 1]
    assert sorted(c for _, captions, _ in model.seen for c in captions) == sorted(f"sample {n}" for n in range(24))


def test_frozen_parts_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "shards", [8])
    model, run = Model(), trainer(tmp_path, max_epochs=1)
    run.fit(model, make(shards))
    run.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    assert set(checkpoint["CaptionImageData"]) == {"train"}


def test_validation_sees_the_same_first_samples_in_order_each_time(tmp_path: Path) -> None:
    train = write_numbered(tmp_path / "train", [8])
    validation = write_numbered(tmp_path / "validation", [20])
    model = Model()
    data = make(train, num_workers=2, validation_shards=validation, validation_samples=10)
    trainer(tmp_path, num_sanity_val_steps=0).fit(model, data)
    assert model.validated == [f"sample {n}" for n in range(10)] * 2


def test_without_validation_shards_a_model_that_validates_still_trains(tmp_path: Path) -> None:
    model = Model()
    trainer(tmp_path).fit(model, make(write_numbered(tmp_path / "train", [8])))
    assert len(model.seen) == 4
    assert model.validated == []


def encoded(data: CaptionImageData) -> list[CaptionImageBatch]:
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_batch_holds_scaled_images_their_features_and_the_null_captions(tmp_path: Path) -> None:
    data = make(write_numbered(tmp_path, [8]))
    data.setup("fit")
    encoder = WordEncoder(width=8, length=4)
    for raw in data.train_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        assert isinstance(raw, RawBatch)
        assert len(batch) == 4
        assert batch.captions == raw.captions
        assert torch.allclose(batch.latents, raw.images.double().div(255).mul(2).sub(1).float(), atol=1e-6)
        expected = encoder(batch.captions)
        assert torch.equal(batch.text.context, expected.context)
        assert torch.equal(batch.text.mask, expected.mask)
        assert torch.equal(batch.null.context, encoder([""]).context)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_through_the_cache_are_the_encoders_and_each_caption_is_encoded_once(
    tmp_path: Path, num_workers: int
) -> None:
    members = {}
    for number in range(24):  # six captions, four times each
        members |= {f"{number}.png": noise_image(number), f"{number}.txt": f"caption {number % 6}".encode()}
    shard = write_tar(tmp_path / "x.tar", members)
    cache = FeatureCache(tmp_path / "cache", max_gb=0.01)
    data = make(shard, num_workers, cache=cache, batch_size=5)
    data.setup("fit")
    cache.store(["caption 2"], data.text(["caption 2"]))
    data.text.asked.clear()  # type: ignore[operator, union-attr]
    encoder = WordEncoder(width=8, length=4)
    for batch in encoded(data):
        expected = encoder(batch.captions)
        assert torch.equal(batch.text.mask, expected.mask)
        assert torch.equal(batch.text.context[batch.text.mask], expected.context[expected.mask])
    assert sorted(data.text.asked) == ["", *(f"caption {n}" for n in (0, 1, 3, 4, 5))]  # type: ignore[arg-type]


def test_full_cache_keeps_the_encoder_out_of_it(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path, [8])
    cache = FeatureCache(tmp_path / "cache", max_gb=0.01)
    data = make(shards, 1, cache=cache)
    data.setup("fit")
    captions = [f"sample {n}" for n in range(8)]
    cache.store([*captions, ""], data.text([*captions, ""]))
    data.text.asked.clear()  # type: ignore[operator, union-attr]
    assert len(encoded(data)) == 2
    assert data.text.asked == []
    assert cache.hits >= 8


def test_text_features_follow_the_order_asked_for(tmp_path: Path) -> None:
    data = make(write_numbered(tmp_path, [8]))
    captions = ["red", "a blue circle", "red", "green"]
    features = data.text_features(captions)
    assert torch.equal(features.context, WordEncoder(width=8, length=4)(captions).context)
    assert data.text.asked == ["red", "a blue circle", "green"]


def test_text_features_of_what_python_hands_over(tmp_path: Path) -> None:
    data = make(write_numbered(tmp_path, [8]), cache=FeatureCache(tmp_path / "cache", 0.01))
    data.setup("fit")
    features = data.text_features(["a \ud83d cat", "a \ufffd cat", ""])
    assert torch.equal(features.context[0], features.context[1])
    for captions in ([None], ["a", 3], None, ["a\0b"]):
        with pytest.raises(ValueError, match=r"^captions: .*no text"):
            data.text_features(captions)  # type: ignore[arg-type]


def test_null_features_first_asked_for_by_validation_serve_training(tmp_path: Path) -> None:
    data = CaptionImageData(WordEncoder(width=8, length=4), Pixels(), str(tmp_path))
    with torch.inference_mode():  # Lightning's validation loop
        null = data.null_features()
    weight = torch.ones(8, requires_grad=True)
    (null.context * weight).sum().backward()  # "Inference tensors cannot be saved for backward", if it were one
    assert weight.grad is not None and weight.grad.any()
    assert data.null_features() is null


def test_model_facing_sizes_come_from_the_frozen_parts(tmp_path: Path) -> None:
    data = CaptionImageData(WordEncoder(width=16, length=6), Halving(), "unused.tar", resolution=48)
    assert (data.context_width, data.context_length) == (16, 6)
    assert (data.latent_channels, data.latent_size) == (12, 24)


def test_decode_is_the_inverse_of_what_training_does_to_images(tmp_path: Path) -> None:
    data = make(write_numbered(tmp_path, [8]))
    data.setup("fit")
    for raw in data.train_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        assert torch.equal(data.decode(batch.latents), raw.images.permute(0, 2, 3, 1))


def test_prediction_gives_each_prompt_with_its_index(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    data = make("no shards needed", prompts=tmp_path / "prompts.txt", batch_size=2)
    batches = trainer(tmp_path).predict(Model(), data)
    assert [(int(i), p) for indices, prompts in batches or [] for i, p in zip(indices, prompts, strict=True)] == list(
        enumerate(["one", "two", "three", "four", "five"])
    )


def test_skipped_samples_are_counted_over_the_workers(tmp_path: Path) -> None:
    shards = []
    for name in ("x", "y"):
        members = {f"{n}.{e}": d for n in range(8) for e, d in (("png", noise_image(n)), ("txt", b"fine"))}
        shards.append(write_tar(tmp_path / f"{name}.tar", members | {"a.png": b"?", "a.txt": b"text", "b.png": b""}))
    data = make(shards, num_workers=2)
    with pytest.warns(UserWarning, match="corrupt image"):
        trainer(tmp_path, max_epochs=1).fit(Model(), data)
    assert data.skipped == {"corrupt image": 2, "missing caption": 2}


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("num_workers", -1), ("resolution", 0), ("shuffle_block", 0), ("validation_samples", 0)],
)
def test_arguments_out_of_range_are_named(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least .*, got {value}"):
        make("x.tar", **{option: value})  # type: ignore[arg-type]


def test_resolution_must_fit_the_autoencoder() -> None:
    with pytest.raises(ValueError, match="resolution 37 is not a multiple of the autoencoder's downsampling 2"):
        CaptionImageData(WordEncoder(width=8, length=4), Halving(), "x.tar", resolution=37)


def test_missing_shards_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CaptionImageData: shards: '.*none-\*\.tar' matches no file"):
        make(f"{tmp_path}/none-*.tar").setup("fit")
    shards = write_numbered(tmp_path, [8])
    with pytest.raises(ValueError, match=r"CaptionImageData: validation_shards: '.*none\.tar' matches no file"):
        make(shards, validation_shards=f"{tmp_path}/none.tar").setup("fit")


def test_fewer_prompts_than_processes_are_refused(tmp_path: Path) -> None:
    data = make("x.tar", prompts=["one"])
    data.trainer = trainer(tmp_path, devices=2, strategy="ddp")
    data.setup("predict")
    with pytest.raises(ValueError, match=r"prompts: 1 leave some of 2 processes without one; .*--trainer\.devices 1"):
        data.predict_dataloader()


def test_several_machines_do_not_share_a_cache_on_a_network_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emf_lightning.data.cache.network_disk.network_file_system", lambda path: "nfs4")
    data = make(write_numbered(tmp_path, [8]), cache=FeatureCache(tmp_path / "cache"))
    data.setup("fit")
    data.trainer = trainer(tmp_path, num_nodes=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"data\.cache\.path: .*cache' lies on a network disk \(nfs4\)"):
        data.setup("fit")


def test_prediction_without_prompts_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts is not set"):
        make("x.tar").predict_dataloader()


def test_captions_to_sample_from_are_drawn_beside_damaged_shards(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "shards", [6] * 4)
    for path in shards:
        Path(path).write_bytes(Path(path).read_bytes()[:7000])
    data = make(shards, sampling_captions=["a", "b"], shuffle_block=3)
    with pytest.warns(UserWarning, match="truncated shard"):
        trainer(tmp_path).fit(Model(), data)


def test_overfit_batches_trains_on_the_same_batches(tmp_path: Path) -> None:
    model = Model()
    shards = write_numbered(tmp_path / "shards", [24])
    trainer(tmp_path, overfit_batches=2, max_epochs=3).fit(model, make(shards, validation_shards=shards))
    batches = [tuple(captions) for _, captions, _ in model.seen]
    assert len(batches) == 6 and len({*batches}) == 2


def test_parts_that_something_else_has_moved_come_back_to_the_device(tmp_path: Path) -> None:
    class Weighted(Halving):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.requires_grad_(False)

        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images) * self.weight

    shards = write_numbered(tmp_path / "shards", [8])
    data = CaptionImageData(CountingEncoder(), Weighted(), shards, batch_size=4, resolution=SIDE, num_workers=0)
    data.setup("fit")
    raw = next(iter(data.train_dataloader()))
    data.encoder.encode(raw)
    data.autoencoder.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # its weights are gone, but it was to be moved
        data.encoder.encode(raw)


def test_a_loop_without_a_trainer_reads_pass_after_pass_and_resumes(tmp_path: Path) -> None:
    shards = write_numbered(tmp_path / "shards", [16])

    def begun() -> CaptionImageData:
        data = make(shards, shuffle_block=16)
        data.setup("fit")
        return data

    def passes(data: CaptionImageData, count: int) -> list[list[str]]:
        return [[caption for raw in data.train_dataloader() for caption in raw.captions] for _ in range(count)]

    data = begun()
    orders = passes(data, 2)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    again = begun()
    again.load_state_dict(data.state_dict())
    assert passes(again, 1) == passes(data, 1)


def test_processes_without_a_trainer_share_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_numbered(tmp_path / "shards", [16])
    seen: list[str] = []
    for rank in range(2):
        for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": 2}.items():
            monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
        data = make(shards)
        data.setup("fit")
        seen += [caption for raw in data.train_dataloader().stream for caption in raw.captions]
    assert sorted(seen) == sorted(f"sample {number}" for number in range(16))


class Mistaken(Halving):
    """Says that its latents have another shape than they have."""

    def __init__(self, channels: int, downsampling: int) -> None:
        super().__init__()
        self.channels, self.downsampling = channels, downsampling


@pytest.mark.parametrize(("channels", "downsampling"), [(3, 2), (12, 4), (48, 4)])
def test_wrong_attributes_of_an_autoencoder_are_named(channels, downsampling):
    encoder = BatchEncoder(WordEncoder(), Mistaken(channels, downsampling), None, None, resolution=8)
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    batch = RawBatch(("a", "b"), Lookup(["a", "b"]), Lookup(["a", "b"]), images, images[:0])
    with pytest.raises(ValueError, match=r"Mistaken.encode gives \[12, 4, 4\], but its channels = "):
        encoder.latents(batch)
    if (channels, downsampling) != (3, 2):  # these images are of the size that it promises
        with pytest.raises(ValueError, match=r"Mistaken.decode gives .*correct these attributes"):
            encoder.decode(torch.zeros(1, 12, 4, 4))
