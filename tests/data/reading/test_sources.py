from __future__ import annotations

import csv
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from emf_lightning.data.reading.decoding import SquareTransform
from emf_lightning.data.reading.loader import ShardLoader
from emf_lightning.data.reading.parquet_shards import ParquetShard
from emf_lightning.data.reading.sources import HubDataset, Source, count, count_all, open_sources
from emf_lightning.data.reading.streams import ShardStream
from emf_lightning.data.reading.tar_members import END
from tests.data.tars import SIDE, noise_image, write_numbered, write_tar

ONES = [f"sample {number}" for number in range(44)]


def texts_beside(folder: Path) -> None:
    """Pictures 0 to 43 in nested folders, each with its text beside it."""
    for number, caption in enumerate(ONES):
        place = folder / ("." if number < 9 else f"sub.{number % 3}/inner")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:03d}.png").write_bytes(noise_image(number))
        (place / f"{number:03d}.txt").write_text(caption)


def imagefolder(folder: Path, write: Callable[[Path, list[dict[str, str]]], None]) -> None:
    """The same pictures, with the captions in one file, as HF's imagefolder has them."""
    rows = []
    for number, caption in enumerate(ONES):
        name = f"{number:03d}.png" if number < 9 else f"train/{number:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise_image(number))
        rows.append({"file_name": name, "text": caption})
    write(folder, rows)


def jsonl(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)


def metadata_parquet(folder: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")


def parquet(folder: Path, numbers: range = range(44), name: str = "train-0", **columns: object) -> Path:
    """A file as ``Dataset.to_parquet`` writes it, in row groups of five rows."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["ant", "bee"]),
    }
    rows = {
        "image": [{"bytes": noise_image(number), "path": None} for number in numbers],
        "text": [f"sample {number}" for number in numbers],
        "label": [number % 2 for number in numbers],
        **columns,
    }
    path = folder / f"{name}.parquet"
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    pyarrow.parquet.write_table(data.data.table, path, row_group_size=5)
    return path


FORMS = {
    "texts beside": texts_beside,
    "metadata.jsonl": lambda folder: imagefolder(folder, jsonl),
    "metadata.csv": lambda folder: imagefolder(folder, table),
    "metadata.parquet": lambda folder: imagefolder(folder, metadata_parquet),
    "parquet": lambda folder: [parquet(folder / "data", range(19)), parquet(folder / "data", range(19, 44), "train-1")],
}


@pytest.fixture(params=FORMS)
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str | Source, ...]:
    FORMS[request.param](tmp_path / "set")
    return open_sources(str(tmp_path / "set"), "shards")


def stream(sources: tuple[str | Source, ...], **options: object) -> ShardStream:
    return ShardStream(sources, SquareTransform(SIDE), 4, **options)  # type: ignore[arg-type]


def captions(sources: tuple[str | Source, ...], **options: object) -> list[str]:
    return [caption for batch in stream(sources, **options) for caption in batch.captions]


def skipped(sources: tuple[str | Source, ...], **options: object) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in stream(sources, **options):
        counts.update(batch.skipped)
    return dict(counts)


def test_each_form_gives_every_picture_with_its_caption(sources: tuple[str | Source, ...], tmp_path: Path) -> None:
    shard = write_numbered(tmp_path / "tars", [44])
    pictures = {c: i for b in stream((shard[0],)) for c, i in zip(b.captions, b.images.tolist(), strict=True)}
    got = {c: i for b in stream(sources) for c, i in zip(b.captions, b.images.tolist(), strict=True)}
    assert got == pictures
    assert sum(map(count, sources)) == 44


def test_ranks_and_workers_share_the_samples_of_each_form(sources: tuple[str | Source, ...]) -> None:
    parts = [captions(sources, rank=rank, ranks=3, shuffle_block=8) for rank in range(3)]
    assert sorted(caption for part in parts for caption in part) == sorted(ONES)
    loader = ShardLoader(stream(pickle.loads(pickle.dumps(sources)), lanes=2), num_workers=2)
    assert sorted(caption for batch in loader for caption in batch.captions) == sorted(ONES)


def test_passes_of_each_form_are_shuffled(sources: tuple[str | Source, ...]) -> None:
    reading = stream(sources, shuffle_block=64)
    orders = []
    for epoch in range(2):
        reading.start(epoch, reading._positions, 0)
        orders.append([caption for batch in reading for caption in batch.captions])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(ONES)
    assert orders[0] != orders[1]
    assert ONES not in orders


def test_each_form_resumes_at_any_batch(sources: tuple[str | Source, ...]) -> None:
    def make() -> ShardLoader:
        return ShardLoader(stream(sources, shuffle_block=8, drop_last=True, seed=3))

    def passes(loader: ShardLoader) -> Iterator[tuple[str, ...]]:
        for _ in range(2):
            for batch in loader:
                loader.acknowledge(batch)
                yield batch.captions

    whole = list(passes(make()))
    for stop in (1, 4, 7, len(whole) // 2, len(whole) // 2 + 3):
        loader, resumed = make(), make()
        before = list(islice(passes(loader), stop))
        resumed.load_state_dict(loader.state_dict())
        assert before + list(islice(passes(resumed), len(whole) - stop)) == whole


def test_a_share_is_held_out_of_each_form_and_the_rest_trains(sources: tuple[str | Source, ...]) -> None:
    held_out = captions(sources, share=0.3, held_out=True)
    rest = [captions(sources, share=0.3, rank=rank, ranks=2) for rank in range(2)]
    assert 5 <= len(held_out) <= 22
    assert sorted(held_out + rest[0] + rest[1]) == sorted(ONES)
    assert captions(sources, share=0.3, held_out=True) == held_out


def test_a_share_is_held_out_of_tar_shards_and_moving_them_keeps_it(tmp_path: Path) -> None:
    here, there = (tuple(write_numbered(tmp_path / name, [19, 25])) for name in ("here", "there"))
    held_out = captions(here, share=0.3, held_out=True)
    assert 5 <= len(held_out) <= 22
    assert captions(there, share=0.3, held_out=True) == held_out
    assert sorted(held_out + captions(here, share=0.3)) == sorted(ONES)


def test_positions_apply_to_a_moved_folder_and_not_to_one_that_changed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        texts_beside(tmp_path / name)
    (one,), (two,) = (open_sources(str(tmp_path / name), "shards") for name in ("one", "two"))
    assert not isinstance(one, str) and not isinstance(two, str)
    assert one.identity == two.identity
    (tmp_path / "two/new.png").write_bytes(noise_image(1))
    (two,) = open_sources(str(tmp_path / "two"), "shards")
    assert not isinstance(two, str) and one.identity != two.identity


def test_folders_count_unusable_samples_by_the_reasons_of_shards(tmp_path: Path) -> None:
    files = {
        "good.png": noise_image(0),
        "good.txt": b"good",
        "again.png": noise_image(0),
        "again.jpg": noise_image(1, form="jpeg"),
        "again.txt": b"again",
        "json.png": noise_image(0),
        "json.json": b'{"caption": "of json"}',
        "uncaptioned.png": noise_image(0),
        "unpictured.txt": b"no picture",
        "empty.png": noise_image(0),
        "empty.txt": b" \n",
        "corrupt.png": noise_image(0)[:40],
        "corrupt.txt": b"corrupt",
        "latin.png": noise_image(0),
        "latin.txt": b"caf\xe9",
        "deep.png.png": noise_image(0),
        ".hidden.png": noise_image(0),
        "large.png": noise_image(0, (99, 99)),
        "large.txt": b"large",
    }
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (shard,) = open_sources(write_tar(tmp_path / "x.tar", files), "shards")
    (source,) = open_sources(str(folder), "shards")
    for name in ("README.md", "Thumbs.db", "notes.pdf"):  # no samples of a folder
        (folder / name).write_bytes(b"?")
    limits = {"member_mb": 0.02}
    assert sorted(captions((source,), **limits)) == sorted(captions((shard,), **limits)) == ["again", "good", "of json"]
    expected = skipped((shard,), **limits)
    assert skipped((source,), **limits) == expected
    assert len(expected) >= 7


def test_odd_files_of_a_folder_are_counted_and_links_are_followed(tmp_path: Path) -> None:
    texts_beside(tmp_path / "elsewhere")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked/round").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "gone.txt").write_text("gone")
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("pipe")
    (folder / ".cache").mkdir()
    (folder / ".cache/x.png").write_bytes(noise_image(0))
    sources = open_sources(str(folder), "shards")
    assert sorted(captions(sources)) == sorted(ONES)
    assert skipped(sources) == {
        "unreadable file (No such file or directory)": 1,
        "image is no file": 1,
        "missing image": 1,
    }


def test_metadata_overrides_texts_and_several_captions_take_turns(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.jpg").write_bytes(noise_image(1, form="jpeg"))
    (tmp_path / "a.txt").write_text("beside a")
    (tmp_path / "b.txt").write_text("beside b")
    rows = [
        {"image": "https://example.org/b", "file_name": "b.jpg", "caption": "row b"},
        {"file_name": "./c.jpg", "caption": ["first c", " ", "second c"]},
    ]
    jsonl(tmp_path, [*rows, {"file_name": "b.jpg", "caption": "other b"}, {"file_name": "gone.jpg", "caption": "x"}])
    with pytest.warns(UserWarning, match="1 of 5 captions name a picture that is not there"):
        sources = open_sources(str(tmp_path), "shards")
    reading, seen = stream(sources), []
    for epoch in range(2):
        reading.start(epoch, reading._positions, 0)
        seen.append({caption for batch in reading for caption in batch.captions})
    assert seen[0] | seen[1] == {"beside a", "row b", "other b", "first c", "second c"}
    assert len(seen[0]) == len(seen[1]) == 3
    assert skipped(sources) == {"missing caption": 1}


def test_halves_of_surrogate_pairs_in_metadata_are_replaced_or_name_no_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(noise_image(1))
    lines = [r'{"file_name": "a.png", "text": "a \ud83d cat"}', r'{"file_name": "b\ud83d.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, r'{"file_name": "\udcff.png", "text": "x"}']))
    with pytest.warns(UserWarning, match="2 of 3 captions name a picture that is not there; they are left out"):
        sources = open_sources(str(tmp_path), "shards")
    assert captions(sources) == ["a \ufffd cat"]
    assert skipped(sources) == {"missing caption": 1}


def test_lists_of_captions_take_turns_in_json_and_parquet(tmp_path: Path) -> None:
    record = json.dumps({"caption": ["one", "two"]}).encode()
    shard = write_tar(tmp_path / "x.tar", {"0.png": noise_image(0), "0.json": record})
    rows = [{"jpg": noise_image(0), "caption": ["one", "two"]}, {"jpg": noise_image(1), "caption": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for path in (shard, str(tmp_path / "x.parquet")):
        reading = stream(open_sources(path, "shards"))
        seen = []
        for epoch in range(3):
            reading.start(epoch, reading._positions, 0)
            seen += [caption for batch in reading for caption in batch.captions]
        assert seen in (["one", "two", "one"], ["two", "one", "two"])


def test_classes_and_named_columns_are_captions(tmp_path: Path) -> None:
    path = parquet(tmp_path, range(4))
    sources = open_sources(str(path), "shards", caption_column="label")
    assert captions(sources) == ["a photo of an ant", "a photo of a bee"] * 2
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0.png").write_bytes(noise_image(0))
    jsonl(tmp_path / "a", [{"file_name": "0.png", "beschreibung": "ein Bild"}])
    assert captions(open_sources(str(tmp_path / "a"), "shards", caption_column="beschreibung")) == ["ein Bild"]
    shard = write_tar(tmp_path / "x.tar", {"0.png": noise_image(0), "0.json": b'{"alt": "other"}'})
    assert captions((shard,), caption_column="alt") == ["other"]


def test_a_named_column_comes_before_a_text_beside_it(tmp_path: Path) -> None:
    """img2dataset writes both: the alternative text, and a record of all columns."""
    members = {}
    for number, record in enumerate([{"caption": "alt", "llava": "long"}, {"caption": "alt"}]):
        members |= {f"{number}.png": noise_image(number), f"{number}.txt": b"alt"}
        members |= {f"{number}.json": json.dumps(record).encode()}
    shard = write_tar(tmp_path / "x.tar", members)
    (tmp_path / "pictures").mkdir()
    for name, content in members.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    for source in (shard, str(tmp_path / "pictures")):
        for column, expected in ((None, ["alt", "alt"]), ("llava", ["alt", "long"])):
            sources = open_sources(source, "shards", caption_column=column)
            assert sorted(captions(sources, caption_column=column)) == expected


def test_parquet_columns_of_other_kinds_do_not_matter(tmp_path: Path) -> None:
    large = pyarrow.large_list(pyarrow.large_string())
    table = pyarrow.table(
        {
            "jpg": pyarrow.array([noise_image(0), noise_image(1)]),
            "caption": pyarrow.array([["one"], ["two"]], type=large),
            "counts": pyarrow.array([[("a", 1)], []], type=pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert captions(open_sources(str(tmp_path / "x.parquet"), "shards")) == ["one", "two"]


def test_a_later_parquet_file_without_the_columns_is_named_in_the_count(tmp_path: Path) -> None:
    for name, column in (("a", "caption"), ("b", "alt")):
        rows = [{"jpg": noise_image(0), column: name}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    sources = open_sources([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")], "shards")
    assert captions(sources) == ["a"]
    (reason,) = skipped(sources)
    assert reason.startswith("parquet file without its columns (has the columns jpg, alt, but none named")
    assert "data.caption_column" in reason


def test_unusable_rows_and_damaged_parquet_files_are_counted(tmp_path: Path) -> None:
    texts = ["good", None, " ", "no picture", "corrupt", "good too"]
    images = [{"bytes": noise_image(n), "path": None} for n in range(6)]
    images[3], images[4] = None, {"bytes": b"?", "path": None}
    parquet(tmp_path, range(6), "a", image=images, text=texts)
    whole = parquet(tmp_path, range(40), "b")
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    middle = parquet(tmp_path, range(40), "c")
    damaged = bytearray(content)
    damaged[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    middle.write_bytes(damaged)
    sources = open_sources([str(tmp_path / f"{name}.parquet") for name in "abc"], "shards")
    got = captions(sources)
    assert {"good", "good too", "sample 0"} <= set(got)
    counts = skipped(sources)
    assert {name: counts[name] for name in ("missing caption", "empty caption", "missing image", "corrupt image")} == {
        "missing caption": 1,
        "empty caption": 1,
        "missing image": 1,
        "corrupt image": counts["corrupt image"],
    }
    assert counts["damaged shard"] >= 1


def test_parquet_is_read_at_an_address_from_the_middle_on(tmp_path: Path) -> None:
    parquet(tmp_path, range(23))
    (source,) = open_sources(f"file://{tmp_path}/*.parquet", "shards")
    assert isinstance(source, ParquetShard) and source.path.startswith("file://")
    texts = [sample.text for sample in source.samples()]
    assert texts == [caption.encode() for caption in ONES[:23]]
    for offset in (1, 4, 5, 17, 22, 23):
        assert [sample.text for sample in source.samples(offset)] == texts[offset:]
    assert list(source.samples(END)) == []


def test_splits_of_a_folder_in_the_hubs_layout_are_kept_apart(tmp_path: Path) -> None:
    parquet(tmp_path / "data", range(4), "train-00000-of-00001")
    parquet(tmp_path / "data", range(4, 6), "validation-00000-of-00001")
    parquet(tmp_path / "data", range(6, 9), "test-00000-of-00001")
    name = str(tmp_path)
    assert captions(open_sources(name, "shards")) == ONES[:4]
    assert captions(open_sources(name, "validation_shards")) == ONES[4:6]
    assert captions(open_sources([HubDataset(name, "test")], "shards")) == ONES[6:9]
    with pytest.raises(ValueError, match="no split dev, but train, validation, test; name one"):
        open_sources(HubDataset(name, "dev"), "shards")


@pytest.mark.parametrize(
    ("names", "argument", "said"),
    [
        (["data-0", "data-1", "val"], "shards", r"of the 3 parquet files in .* 2 belong to no split .*data-0"),
        (["train-0", "extra"], "shards", "1 belong to no split"),
        (["shapes-0", "cats-1", "animals-test-2"], "validation_shards", "2 belong to no split"),
        (["train-0"], "validation_shards", "has no split validation or test, but train; name one"),
        (["test-0"], "shards", "has no split train, but test; name one"),
    ],
)
def test_files_that_the_hubs_library_would_leave_out_are_named(
    tmp_path: Path, names: list[str], argument: str, said: str
) -> None:
    for number, name in enumerate(names):
        parquet(tmp_path / "set", range(number, number + 1), name)
    with pytest.raises(ValueError, match=said):
        open_sources(str(tmp_path / "set"), argument)


@pytest.mark.parametrize("argument", ["shards", "validation_shards"])
def test_files_whose_names_say_no_split_are_all_read(tmp_path: Path, argument: str) -> None:
    for number in range(3):
        parquet(tmp_path / "set", range(number, number + 1), f"constraints-{number}")
    assert captions(open_sources(str(tmp_path / "set"), argument)) == ONES[:3]


def test_a_readme_may_leave_files_out(tmp_path: Path) -> None:
    for name in ("train-0", "extra"):
        parquet(tmp_path / "set", range(1), name)
    (tmp_path / "set/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: train-0.parquet\n---\n")
    assert captions(open_sources(str(tmp_path / "set"), "shards")) == ONES[:1]


def test_a_caption_of_a_table_may_be_of_any_length(tmp_path: Path) -> None:
    long = "red " * 50_000
    imagefolder(tmp_path / "set", lambda folder, rows: table(folder, [rows[0] | {"text": long.strip()}, *rows[1:]]))
    assert long.strip() in captions(open_sources(str(tmp_path / "set"), "shards"))


def test_pictures_shards_and_folders_go_together_in_a_list(tmp_path: Path) -> None:
    texts_beside(tmp_path / "pictures")
    (shard,) = write_numbered(tmp_path / "tars", [3])
    nested = write_numbered(tmp_path / "deep/er", [2])
    sources = open_sources([str(tmp_path / "pictures"), str(tmp_path / "tars"), str(tmp_path / "deep")], "shards")
    assert [str(source) for source in sources] == [str(tmp_path / "pictures"), shard, nested[0]]
    assert len(captions(sources)) == 49


def columns(**named: list[object]) -> Callable[[Path], object]:
    """Makes a folder with a parquet file of these columns."""

    def make(folder: Path) -> None:
        folder.mkdir()
        pyarrow.parquet.write_table(pyarrow.table(named), folder / "x.parquet")

    return make


def described(write: Callable[[Path], object]) -> Callable[[Path], object]:
    """Makes a folder of pictures whose captions ``write`` writes."""
    return lambda folder: imagefolder(folder, lambda place, rows: write(place))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.mkdir(), "'set' holds no pictures, tar shards or parquet files"),
        (described(lambda folder: None), "'set' holds 44 pictures and no captions"),
        (
            described(lambda folder: jsonl(folder, [{"file_name": "000.png", "text": None}])),
            "has no rows with file_name and a caption",
        ),
        (
            described(lambda folder: jsonl(folder, [{"file_name": "000.png", "alt": "x"}])),
            "its columns are file_name, alt; name the captions' with data.caption_column",
        ),
        (described(lambda folder: (folder / "metadata.csv").write_bytes(b"\xff")), "metadata.csv cannot be read"),
        (described(lambda folder: (folder / "metadata.parquet").write_bytes(b"?")), "cannot be read as parquet"),
        (described(lambda folder: write_numbered(folder / "deep", [1])), "'set' holds pictures and shards"),
        (columns(image=[b""], alt=["x"]), "has the columns image, alt, but none named caption or prompt or text"),
        (columns(url=["x"], text=["x"]), "has the columns url, text, none of pictures; name it with data.image_column"),
        (columns(a=[b""], b=[b""], text=["x"]), "several of pictures (a, b); name it with data.image_column"),
        (columns(a=[b""], text=[1]), "holds Value('int64'), neither text nor classes"),
    ],
)
def test_what_holds_nothing_to_train_on_is_one_sentence(
    make: Callable[[Path], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("set"))
    with pytest.raises(ValueError) as error:
        open_sources("set", "shards")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["owner/name", "hf://datasets/owner/name", "hf://owner/name@main"])
def test_a_hub_name_that_cannot_be_reached_is_one_sentence(entry: str) -> None:
    with pytest.raises(ValueError, match=r"shards: 'owner/name' matches no file .*, and no data set of the hub \("):
        open_sources(entry, "shards")


@pytest.mark.parametrize(("shards", "exact"), [(1, True), (64, True), (65, False), (500, False)])
def test_many_shards_are_counted_by_a_few_that_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, exact: bool
) -> None:
    from emf_lightning.data.reading import tar_members

    sizes = np.random.default_rng(0).integers(2, 12, shards).tolist()
    for size in set(sizes):
        write_tar(tmp_path / f"{size}.tar", {f"{number}.txt": b"a" for number in range(size)})
    paths = [str(tmp_path / f"{size}.tar") for size in sizes]
    opened: list[str] = []
    original = tar_members.open_shard

    def counting(path: str, **options: bool):  # type: ignore[no-untyped-def]
        opened.append(path)
        return original(path, **options)

    monkeypatch.setattr(tar_members, "open_shard", counting)
    found = count_all(paths)
    assert len(opened) == min(shards, 64)
    assert found == sum(sizes) if exact else 0.8 * sum(sizes) < found < 1.2 * sum(sizes)


def test_large_shards_are_counted_by_their_first_samples_and_folders_whole(tmp_path: Path) -> None:
    large = write_tar(tmp_path / "large.tar", {f"{number}.txt": b"a" for number in range(9000)})
    assert 0.9 * 9000 < count_all([large]) < 1.1 * 9000
    assert count_all([]) == 0


def test_captioned_pictures_beside_shards_are_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_numbered(tmp_path, [2])
    (tmp_path / "preview.png").write_bytes(noise_image(0))  # as a contact sheet
    (tmp_path / "0_stats.json").write_text("{}")
    assert len(open_sources(str(tmp_path), "shards")) == 1
    assert not recwarn.list
    (tmp_path / "preview.txt").write_text("a circle")
    with pytest.warns(UserWarning, match=r"holds 1 captioned pictures beside its shards \(preview, \.\.\.\)"):
        open_sources(str(tmp_path), "shards")
    (tmp_path / "preview.txt").unlink()
    jsonl(tmp_path, [{"file_name": "preview.png", "caption": "a circle"}])
    with pytest.warns(UserWarning, match="the shards alone are read"):
        open_sources(str(tmp_path), "shards")


@pytest.mark.parametrize("name", ["LICENSE", "dataset_infos.json", "requirements.txt", "captions.json"])
def test_files_beside_shards_that_are_no_pictures_are_no_samples(tmp_path: Path, name: str) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    write_numbered(tmp_path / "set/data", [3])
    (tmp_path / "set" / name).write_text("{}")
    (tmp_path / "pictures/a.png").write_bytes(noise_image(1))
    (tmp_path / "pictures/a.txt").write_text("a circle")
    (shard,) = open_sources(str(tmp_path / "set"), "shards")
    assert str(shard).endswith(".tar")
    for order in (["set", "pictures"], ["pictures", "set"]):
        pictures, _ = open_sources([str(tmp_path / folder) for folder in order], "shards")
        assert [sample.location for sample in pictures.samples()] == [str(tmp_path / "pictures/a")]
    with pytest.raises(ValueError, match="holds pictures and shards"):
        open_sources(str(tmp_path / "set"), "shards", images=False)
