"""A saved folder whose files were damaged is refused by name; one without digests loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emf_lightning.digests import DIGESTS, check_digests, write_digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer/weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "README.md").write_text("text")
    write_digests(tmp_path)
    return tmp_path


def test_a_folder_as_it_was_written_passes_and_its_card_may_be_edited(folder):
    (folder / "README.md").write_text("another text")
    check_digests(folder)
    (folder / "model_index.json").write_text("{} ")
    (folder / DIGESTS).unlink()
    check_digests(folder)


@pytest.mark.parametrize("position", range(0, 256 * 40, 499))
def test_every_flipped_bit_is_seen(folder, position):
    path = folder / "transformer/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"transformer/weights.safetensors is damaged: .* write the folder again"):
        check_digests(folder)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/weights.safetensors"])
def test_a_missing_or_short_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        check_digests(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check_digests(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, json.dumps(3)])
def test_damaged_digests_are_one_sentence(folder, text):
    (folder / DIGESTS).write_text(text)
    with pytest.raises(ValueError, match=r"digests.json (cannot be read|holds no) .*; write the folder again"):
        check_digests(folder)
