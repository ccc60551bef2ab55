from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.tars import SIDE, noise_image, write_tar


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Three sets as they are downloaded: BLIP3o-60k, ShareGPT-4o-Image, Echo-4o-Image; all number from 0."""
    (tmp_path / "BLIP3o-60k").mkdir()
    pairs = {
        "0.jpg": noise_image(0, (20, 30), "jpeg"),
        "0.txt": b"of blip",
        "1.jpg": noise_image(1),
        "1.txt": b"of blip too",
    }
    write_tar(tmp_path / "BLIP3o-60k/00000.tar", pairs)
    sharegpt = tmp_path / "ShareGPT-4o-Image"
    sharegpt.mkdir()
    write_tar(sharegpt / "text_to_image_part_0.tar", {f"image/{n}.png": noise_image(n) for n in range(3)})
    records = [{"input_prompt": f"of sharegpt {n}", "output_image": f"image/{n}.png"} for n in (2, 0)]
    (sharegpt / "text_to_image.json").write_text(json.dumps(records, indent=1))
    echo = tmp_path / "Echo-4o-Image/Instruction-Following-Image"
    (echo / "images").mkdir(parents=True)
    plain = write_tar(tmp_path / "plain.tar", {f"0000{n}.jpg": noise_image(n, form="jpeg") for n in range(2)})
    with tarfile.open(echo / "images/a.tar.gz", "w:gz") as packed, tarfile.open(plain) as tar:
        for member in tar:
            packed.addfile(member, tar.extractfile(member))
    place = "/Echo-4o-Image/Instruction-Following-Image/images"
    lines = [{"instruction": f"of echo {n}", "output_image": f"{place}/0000{n}.jpg", "type": "hard"} for n in range(2)]
    (echo / "Instruction-Following-Image.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_the_published_sets_are_read_as_they_are(published, monkeypatch):
    monkeypatch.chdir(published)
    data = CaptionImageData(
        WordEncoder(width=8, length=4),
        Pixels(),
        [
            "BLIP3o-60k",
            "ShareGPT-4o-Image/text_to_image_part_*.tar",
            "Echo-4o-Image/Instruction-Following-Image/images",
        ],
        captions=[
            "ShareGPT-4o-Image/text_to_image.json",
            str(published / "Echo-4o-Image/Instruction-Following-Image/Instruction-Following-Image.jsonl"),
        ],
        resolution=SIDE,
        batch_size=1,
        num_workers=0,
    )
    data.setup("fit")
    with pytest.warns(UserWarning, match="missing caption"):
        captions = {batch.captions[0] for batch in data.train_dataloader()}
    assert captions == {"of blip", "of blip too", "of sharegpt 0", "of sharegpt 2", "of echo 0", "of echo 1"}


def test_a_file_holds_for_its_folder_and_below(tmp_path):
    for folder in ("a", "a/b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps([{"prompt": f"in {folder}", "image": "0.png"}]))
    files = CaptionFiles([tmp_path / "c/x.json", tmp_path / "a/x.json"])
    assert files.find(f"{tmp_path}/a/x.tar/0") == "in a"
    assert files.find(f"{tmp_path}/a/b/x.tar/folder/0") == "in a"
    assert files.find(f"{tmp_path}/c/x.tar/0") == "in c"
    assert files.find(f"{tmp_path}/c/x.tar/1") is None
    assert files.find(f"{tmp_path}/cc/x.tar/0") is None
    assert CaptionFiles(str(tmp_path / "a/x.json")).find(f"{tmp_path}/a/x.tar/0") == "in a"


def test_an_image_of_the_same_folder_in_a_file_of_another_place_hides_none(tmp_path):
    for folder, image in {"a": "p/0.png", "c": "0.png"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps([{"prompt": f"in {folder}", "image": image}]))
    files = CaptionFiles([tmp_path / "a/x.json", tmp_path / "c/x.json"])
    assert files.find(f"{tmp_path}/c/p.tar/0") == "in c"
    assert files.find(f"{tmp_path}/a/p.tar/0") == "in a"


def test_shards_that_number_their_images_alike_do_not_slow_each_other(tmp_path):
    records = [{"image": f"part-{shard}/{n}.jpg", "caption": f"{shard} {n}"} for shard in range(200) for n in range(3)]
    (tmp_path / "x.json").write_text(json.dumps(records))
    files, read = CaptionFiles(tmp_path / "x.json"), []
    images = files._images

    class Recorded:
        def __getitem__(self, row):
            read.append(row)
            return images[row]

    files._images = Recorded()
    assert files.find(f"{tmp_path}/part-77.tar/2") == "77 2"
    assert len(read) == 1


def test_a_key_may_be_named_and_one_that_is_missing_is_said(tmp_path):
    record = {"image": "0.png", "caption": "short", "long_caption": "long"}
    (tmp_path / "x.json").write_text(json.dumps([record, {"image": "1.png", "caption": "short alone"}]))
    files = CaptionFiles(tmp_path / "x.json", "long_caption")
    assert [files.find(f"{tmp_path}/x.tar/{n}") for n in (0, 1)] == ["long", "short alone"]
    with pytest.warns(UserWarning, match=r"caption_column: no record of .*x\.json' has 'long_captoin'"):
        files = CaptionFiles(tmp_path / "x.json", "long_captoin")
    assert files.find(f"{tmp_path}/x.tar/0") == "short"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "neither JSON nor JSON lines"),
        ('[{"prompt": "no image"}, 3]', "holds no record with one of caption"),
        ("", "holds no record"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"captions: '.*x\.json' .*{message}|captions: '.*x\.json' {message}"):
        CaptionFiles(tmp_path / "x.json")
    with pytest.raises(ValueError, match="captions: cannot read"):
        CaptionFiles(tmp_path / "none.json")
