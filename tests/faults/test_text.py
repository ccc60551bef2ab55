"""Captions and prompts as the world writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emf_lightning.data.prompt_list import PromptList
from emf_lightning.data.reading.caption_files import CaptionFiles
from emf_lightning.data.reading.decoding import UnusableSampleError
from emf_lightning.text.plain import lines, neutral, parse_json, plain, shorten
from emf_lightning.text.words import WordEncoder

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=20))
def test_plain_text_can_be_written_and_is_kept_if_it_could_be(text: str) -> None:
    made = plain(text)
    made.encode()
    assert plain(made) == made
    if not any("\ud800" <= letter <= "\udfff" or letter == "\ufeff" for letter in text):
        assert made == text.strip()


def test_every_lone_surrogate_that_json_can_escape_becomes_valid(tmp_path: Path) -> None:
    for code in (0xD800, 0xDBFF, 0xDC00, 0xDFFF):
        assert plain(json.loads(f'"a\\u{code:04x}b"')) == "a\ufffdb"
    assert plain(json.loads(r'"\ud83d\ude00"')) == "\U0001f600"


def test_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "".join(f"a{mark}b\n" for mark in SEPARATORS)
    (tmp_path / "p.txt").write_bytes(("\ufeff" + text + "\r\nlast\r\n").encode())
    assert PromptList(tmp_path / "p.txt").prompts == [f"a{mark}b" for mark in SEPARATORS] + ["last"]
    (tmp_path / "p.txt").write_bytes("a cow\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="NUL characters"):
        PromptList(tmp_path / "p.txt")


def test_lines_of_json_hold_other_separators() -> None:
    rows = [f"a{mark}b" for mark in SEPARATORS]
    assert [json.loads(line) for line in lines("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))] == rows
    assert lines("") == [] and lines("a") == ["a"] and lines("a\n\nb\n") == ["a", "", "b"]


def test_json_of_any_kind_is_read_or_a_value_error() -> None:
    assert parse_json(b'{"caption": "a", "n": %s}' % (b"9" * 5000))["caption"] == "a"
    assert parse_json('{"a": 1, "a": 1, "b": 1, "b": 2}') == {"a": 1, "b": None}
    with pytest.raises(ValueError, match="deeply"):
        parse_json("[" * 100_000)


def files(folder: Path, *records: dict) -> CaptionFiles:
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    return CaptionFiles(folder / "c.jsonl")


@pytest.mark.parametrize(
    "path", ["{}/img7.png", "deep/{}/img7.png", "{}\\img7.png", "C:\\set\\{}\\img7.png", "./{}/img7.png"]
)
@pytest.mark.parametrize("place", ["x.tar/{}/img7", "x.tar/./{}/img7", "{}.tar/img7", "{}/x.tar.gz/img7"])
def test_an_image_gets_its_own_folders_caption(tmp_path: Path, path: str, place: str) -> None:
    captions = files(tmp_path, *({"caption": f"of {n}", "image": path.format(n)} for n in "abc"))
    for name in "abc":
        assert captions.find(f"{tmp_path}/{place.format(name)}") == f"of {name}"


def test_what_could_be_several_images_is_not_guessed(tmp_path: Path) -> None:
    captions = files(tmp_path, *({"caption": f"of {n}", "image": f"{n}/img7.png"} for n in "ab"))
    with pytest.raises(UnusableSampleError, match="several images"):
        captions.find(f"{tmp_path}/x.tar/img7")
    series = files(tmp_path, *({"caption": f"of {n}", "image": f"photo.{n}.png"} for n in "12"))
    with pytest.raises(UnusableSampleError, match="several images"):
        series.find(f"{tmp_path}/x.tar/photo")


def test_another_folders_caption_is_not_taken(tmp_path: Path) -> None:
    records = [{"caption": "of a", "image": "a/img7.png"}, {"caption": "of b", "image": "b/img8.png"}]
    captions = files(tmp_path, *records)
    assert captions.find(f"{tmp_path}/x.tar/b/img7") is None
    assert captions.find(f"{tmp_path}/x.tar/else/img7") == "of a"  # folders of another name say nothing


def test_several_captions_take_turns_by_seed_and_pass(tmp_path: Path) -> None:
    records = [{"caption": f"caption {n}", "image": f"{i}.png"} for n in range(5) for i in range(20)]
    captions = files(
        tmp_path, *records, {"caption": None, "image": "0.png"}, {"caption": ["caption 0"], "image": "0.png"}
    )
    for image in range(3):
        place = f"{tmp_path}/x.tar/{image}"
        assert {captions.find(place, 0, epoch) for epoch in range(5)} == {f"caption {n}" for n in range(5)}
        assert captions.find(place, 3, 4) == captions.find(place, 3, 4) == captions.find(place, 3, 9)
    assert len({captions.find(f"{tmp_path}/x.tar/{image}") for image in range(20)}) > 1
    assert len({captions.find(f"{tmp_path}/x.tar/0", seed) for seed in range(20)}) > 1


def test_null_captions_are_no_text(tmp_path: Path) -> None:
    captions = files(tmp_path, {"caption": None, "image": "a.png"}, {"caption": "of b", "image": "b.png"})
    assert captions.find(f"{tmp_path}/x.tar/a") is None


def test_a_broken_line_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    good = json.dumps({"caption": "a\u2028b \ud800", "image": "a.png"}, ensure_ascii=True)
    (tmp_path / "c.jsonl").write_text("[" * 100_000 + "\n" + good + "\n{\n")
    with pytest.warns(UserWarning, match=r"2 lines of .* are not JSON .*line 1: nested too deeply"):
        captions = CaptionFiles(tmp_path / "c.jsonl")
    assert captions.find(f"{tmp_path}/x.tar/a") == "a\u2028b \ufffd"
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe" + good.encode("utf-16-le"))
    with pytest.raises(ValueError, match="neither JSON nor JSON lines"):
        CaptionFiles(tmp_path / "c.jsonl")


def test_special_tokens_in_a_caption_are_broken_and_all_else_is_kept() -> None:
    tokens = {"<end_of_text>", "</s>", "[sep]", "<|im_end|>"}
    for text in ("<end_of_text>", "a </s> b", "<END_OF_TEXT>", "＜/s＞", "[SEP]", "<<|im_end|>>"):
        assert neutral(text, tokens) != text
        assert neutral(neutral(text, tokens), tokens) == neutral(text, tokens)
    for text in ("a <b> c", "x < y > z", "[a]", "!", "a photo of a cat", "<3 [SE P]"):
        assert neutral(text, tokens) == text


def test_a_message_holds_the_beginning_of_a_long_caption() -> None:
    assert shorten("a" * 260_000) == "a" * 80 + "... (260,000 characters)"
    with pytest.warns(UserWarning, match="is cut to length 2") as warned:
        WordEncoder(width=8, length=2).encode(["word " * 50_000])
    assert len(str(warned[0].message)) < 400
