from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from emf_lightning.cli import main
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.dataset_shards import caption_function, dataset_samples, open_dataset, write_samples
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests import pipelines
from tests.data.tars import noise_image


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return pipelines.cifar10(tmp_path_factory.mktemp("hub") / "cifar10")


def batch_of(shards, **settings):
    data = CaptionImageData(
        WordEncoder(width=16), Pixels(), str(shards), batch_size=8, num_workers=0, shuffle_block=1, **settings
    )
    data.setup("fit")
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_images_and_classes_survive_the_round_trip(cifar, tmp_path):
    dataset = open_dataset(str(cifar), "train")
    paths = write_samples(dataset_samples(dataset, "label"), tmp_path / "shards", {}, samples_per_shard=10)
    assert [path.name for path in paths] == ["data-000000.tar", "data-000001.tar", "data-000002.tar"]
    batch = batch_of(paths[0], resolution=32)
    for row in range(8):
        pixels = torch.from_numpy(np.asarray(dataset[row]["img"])).permute(2, 0, 1)
        assert torch.allclose((batch.latents[row] + 1) * 127.5, pixels.float(), atol=1e-3)
    assert batch.captions[:3] == ("a photo of an airplane", "a photo of an automobile", "a photo of a bird")


def test_an_interrupted_call_writes_only_what_is_missing(tmp_path):
    samples = [(None, f"caption {i}") for i in range(25)]
    paths = write_samples(samples, tmp_path, {"rows": 25}, samples_per_shard=10)
    before = [path.stat().st_mtime_ns for path in paths]
    content = paths[1].read_bytes()
    paths[1].unlink()
    assert write_samples(samples, tmp_path, {"rows": 25}, samples_per_shard=10) == paths
    after = [path.stat().st_mtime_ns for path in paths]
    assert (after[0], after[2]) == (before[0], before[2])
    assert len(paths[1].read_bytes()) == len(content)
    with pytest.raises(ValueError, match="holds other samples"):
        write_samples(samples, tmp_path, {"rows": 26}, samples_per_shard=10)


def test_shards_without_a_manifest_are_not_taken_for_these(tmp_path):
    write_samples([(None, "theirs")], tmp_path, {"rows": 1})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"data-000000\.tar' has no manifest\.json beside it"):
        write_samples([(None, "ours")], tmp_path, {"rows": 2})


def test_a_caption_that_is_nearly_a_column_is_refused():
    dataset = Dataset.from_dict({"image": ["x"], "label_text": ["a cat"]})
    with pytest.raises(ValueError, match=r"'label_txt' is no column.*did you mean 'label_text'"):
        caption_function(dataset, "label_txt")
    assert caption_function(dataset, "a photo")({}) == "a photo"


def test_captions_alone_are_read_without_images(tmp_path):
    write_samples([(None, f"a red cat {i}") for i in range(8)], tmp_path, {})
    batch = batch_of(tmp_path, resolution=16, images=False)
    assert batch.captions == tuple(f"a red cat {i}" for i in range(8))
    assert batch.latents.shape == (8, 3, 16, 16)
    assert not batch.latents.any()
    with pytest.raises(ValueError, match="8 x missing image"):
        batch_of(tmp_path, resolution=16)


def test_a_copy_that_save_to_disk_wrote_is_read_too(cifar, tmp_path):
    whole = open_dataset(str(cifar), "train")
    whole.save_to_disk(str(tmp_path / "saved"))
    again = open_dataset(str(tmp_path / "saved"), "train")
    assert again[5]["label"] == whole[5]["label"]
    with pytest.raises(ValueError, match="there are no samples"):
        write_samples(iter(()), tmp_path / "none", {})


def folder_of(path, listed, pictures):
    for number, name in enumerate(pictures):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(noise_image(number))
    (path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{name}", "text": "{name}"}}\n' for name in listed))
    return path


@pytest.mark.parametrize("caption", ["text", "a photo"])
def test_pictures_that_the_metadata_file_does_not_list_are_counted(tmp_path, capsys, caption):
    folder = folder_of(tmp_path / "set", ["a.png", "gone.png"], ["a.png", "b.png", "in/c.png"])
    main(["images", "--dataset", str(folder), "--out", str(tmp_path / "out"), "--caption", caption])

    said = capsys.readouterr().out
    assert "1 samples in 1 shards" in said
    assert "1 x unreadable image file (No such file or directory) (row 1 first)" in said
    assert f"2 x not listed in the metadata file ({folder}/b.png first)" in said


def test_a_folder_without_metadata_and_one_whose_pictures_are_listed_lose_none(tmp_path, capsys):
    for number, listed in enumerate(([], ["a.png", "in/c.png"])):
        folder = folder_of(tmp_path / f"set{number}", listed, ["a.png", "in/c.png"])
        if not listed:
            (folder / "metadata.jsonl").unlink()
        main(["images", "--dataset", str(folder), "--out", str(tmp_path / f"out{number}")])
        said = capsys.readouterr().out
        assert "2 samples in 1 shards" in said and "left out" not in said


@pytest.mark.parametrize(
    "line", [r'{"file_name": "a.png", "text": "a \ud83d cat"}', '{"file_name": "a.p', '{"name": "a"}']
)
def test_a_damaged_metadata_file_names_the_folder_that_training_reads(tmp_path, line):
    folder = folder_of(tmp_path / "set", ["a.png"], ["a.png"])
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(
        ValueError, match=r"cannot read split .*set \(.*\); check the split, and the files there; .*data.shards"
    ):
        open_dataset(str(folder), "train")
