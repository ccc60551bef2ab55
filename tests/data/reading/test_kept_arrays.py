"""Captions of large files are read once and mapped from then on; they are those of the files."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading import kept_arrays
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.metadata_files import MetadataCaptions

FORK = multiprocessing.get_context("fork")
ROWS = [f"a {word} of number {n}, \u2028 Würfel" for n in range(600) for word in ("cube", "red  square", " cone ")]
PROMPTS = [row.strip() for row in ROWS]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_arrays, "SMALLEST", 10_000)
    return tmp_path / "cache/emf_lightning/captions"


def written(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\ufeff" + "\n".join(["", *lines, " ", ""]), encoding="utf-8", newline="")
    return path


def prompts(path: Path) -> list[str]:
    return list(PromptList(path).prompts)


def same(first: Sequence[object], second: Sequence[object]) -> bool:
    """Whether both are equal; pytest would take minutes to explain a difference."""
    return first == second


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no text is read."""

    def refuse(*_: object) -> None:
        raise AssertionError("the file is read again")

    for place in ("prompt_list._read", "reading.caption_files._arrays", "reading.metadata_files._arrays"):
        monkeypatch.setattr(f"emf_lightning.data.{place}", refuse)


def test_prompts_are_the_files_lines_at_each_start(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "p.txt", ROWS)
    assert same(prompts(path), PROMPTS)
    unread(monkeypatch)
    again = PromptList(path)
    assert same(again.prompts, PROMPTS) and again[len(again) - 1] == (len(PROMPTS) - 1, PROMPTS[-1])
    assert again.prompts[-1] == PROMPTS[-1] and again.prompts[3:7] == PROMPTS[3:7]
    with pytest.raises(IndexError):
        again.prompts[len(PROMPTS)]


def change_size(path: Path) -> None:
    path.write_text(path.read_text() + "another\n")


def change_middle(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:20_000] + "#" + text[20_001:])
    os.utime(path, ns=(0, 1))


def change_end_at_the_same_time(path: Path) -> None:
    about = path.stat()
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + "#" + path.read_text()[len(text) :])
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("change", [change_size, change_middle, change_end_at_the_same_time])
def test_a_changed_file_is_read_again_and_a_run_keeps_what_it_began_with(
    tmp_path: Path, kept: Path, change: Callable[[Path], None]
) -> None:
    path = written(tmp_path / "p.txt", ROWS)
    running = PromptList(path).prompts
    change(path)
    changed = [line.strip("\ufeff ") for line in path.read_text().split("\n") if line.strip("\ufeff ")]
    assert same(running, PROMPTS) and not same(changed, PROMPTS)
    assert same(prompts(path), changed) and same(prompts(path), changed)
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "list"])
def test_what_is_damaged_is_made_again(tmp_path: Path, kept: Path, damage: str) -> None:
    path = written(tmp_path / "p.txt", ROWS)
    prompts(path)
    (folder,) = kept.iterdir()
    if damage == "missing":
        (folder / "ends.npy").unlink()
    elif damage == "list":
        (folder / "arrays.json").write_text("[")
    else:
        os.truncate(folder / "data.npy", 1000 if damage == "short" else 0)
    assert same(prompts(path), PROMPTS) and same(prompts(path), PROMPTS)
    assert [each.name for each in kept.iterdir()] == [folder.name]


@pytest.mark.parametrize("cache", ["{}/file", "/proc/none", "relative", ""])
def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept_arrays, "SMALLEST", 10_000)
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    monkeypatch.setenv("HOME", "nowhere")
    path = written(tmp_path / "p.txt", ROWS)
    assert same(prompts(path), PROMPTS) and same(prompts(path), PROMPTS)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "p.txt"]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, kept: Path) -> None:
    path = written(tmp_path / "p.txt", ROWS)

    def build() -> kept_arrays.Arrays:
        change_size(path)
        return {"numbers": np.arange(3)}

    for _ in range(2):
        assert kept_arrays.kept_arrays([path], "numbers", build)["numbers"].tolist() == [0, 1, 2]
    assert not kept.exists()


def test_small_files_and_pipes_are_not_kept(tmp_path: Path, kept: Path) -> None:
    assert prompts(written(tmp_path / "p.txt", ROWS[:3])) == PROMPTS[:3]
    os.mkfifo(tmp_path / "pipe")
    writer = FORK.Process(target=written, args=(tmp_path / "pipe", ROWS))
    writer.start()
    assert same(prompts(tmp_path / "pipe"), PROMPTS)
    writer.join()
    assert not kept.exists()


def test_bad_lines_of_a_large_file_are_errors_each_time(tmp_path: Path, kept: Path) -> None:
    for content, message in (
        ("\n".join(ROWS).encode() + b"\n\xff\n", "not UTF-8"),
        ("\n".join(ROWS).encode("utf-16-le"), "UTF-8"),
        (b"\n \r\n" * 9000, "holds no prompt"),
    ):
        (tmp_path / "p.txt").write_bytes(content)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"prompts: .*p\.txt.* {message}"):
                PromptList(tmp_path / "p.txt")


def check_prompts(path: Path) -> None:
    assert same(prompts(path), PROMPTS)


def test_processes_that_start_at_once_keep_one(tmp_path: Path, kept: Path) -> None:
    path = written(tmp_path / "p.txt", ROWS)
    started = [FORK.Process(target=check_prompts, args=(path,)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert len(list(kept.iterdir())) == 1
    check_prompts(path)


def records(seed: int) -> list[str]:
    """Images in folders, of several captions, given twice, with and without a folder, and lines that are no use."""
    rows = [
        {"caption": [f"{seed}: of {n}", f"{seed}: again {n % 5}", "of all"], "image": f"{n % 6}/im{n % 700}.x.png"}
        for n in range(1500)
    ]
    rows += [{"prompt": f"{seed}: bare {n}", "file_name": f"bare{n}.png"} for n in range(50)]
    rows += [{"prompt": None, "image": "0/none.png"}, {"prompt": "\0", "image": "a.png"}, {"image": "b.png"}]
    return [json.dumps(row) for row in rows] + ["", "{", '"\\ud800"']


def asked(files: CaptionFiles, folder: Path) -> list[object]:
    """What the files say about samples."""
    found: list[object] = [files.per_image]
    for place in ("x.tar", "set/y.tar", "0.tar", "7.tar"):
        for name in ("im3", "im17", "bare4", "none", "other"):
            for middle in ("", "0/", "3/", "z/"):
                location = f"{folder}/{place}/{middle}{name}"
                try:
                    found += [files.find(location, 1, epoch) for epoch in range(3)] + list(files.find_all(location))
                except Exception as error:  # several images match
                    found.append(str(error))
    return found


def test_captions_of_images_and_warnings_are_the_same_at_each_start(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    paths = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "set/c.jsonl"]
    for seed, path in enumerate(paths):
        path.write_text("\n".join(records(seed)))
    answers = []
    for smallest in (10**12, 10_000, 10_000):
        monkeypatch.setattr(kept_arrays, "SMALLEST", smallest)
        with pytest.warns(UserWarning, match="lines of .* are not JSON") as said:
            answers.append((asked(CaptionFiles(paths), tmp_path), [str(each.message) for each in said]))
        if list(kept.glob("*")):
            unread(monkeypatch)
    assert same(answers[0], answers[1]) and same(answers[0], answers[2])
    assert len(answers[0][1]) == 3
    several = "several images in the caption files match" in answers[0][0]
    assert several


def test_metadata_of_pictures_is_the_same_at_each_start(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"file_name": f"{n % 900}.png", "caption": [f"of {n}", "of all"]} for n in range(1800)]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first = MetadataCaptions([str(path)])
    unread(monkeypatch)
    second = MetadataCaptions([str(path)])
    for each in (first, second):
        assert each.find(str(tmp_path / "5")) == ("of 5", "of all", "of 905")
        assert each.find(str(tmp_path / "x")) == ()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no rows"):
        MetadataCaptions([str(path)], "text")


def test_what_no_start_has_used_for_a_month_is_removed(tmp_path: Path, kept: Path) -> None:
    old, used = written(tmp_path / "a.txt", ROWS), written(tmp_path / "b.txt", [*ROWS, "last"])
    prompts(old)
    (first,) = kept.iterdir()
    os.utime(first, (0, 0))
    prompts(old)  # used again
    prompts(used)
    assert first.is_dir() and len(list(kept.iterdir())) == 2
    os.utime(first, (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts(written(tmp_path / "c.txt", [*ROWS, "end"]))
    assert not first.exists() and len(list(kept.iterdir())) == 2
