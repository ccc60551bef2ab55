from __future__ import annotations

from pathlib import Path

import pytest

from emf_lightning.data.prompt_list import PromptList


def test_items_are_the_lines_that_are_not_blank_with_their_index(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa red circle \n\n  zwei Würfel\n", encoding="utf-8")
    prompts = PromptList(tmp_path / "p.txt")
    assert [prompts[index] for index in range(len(prompts))] == [(0, "a red circle"), (1, "zwei Würfel")]


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "cannot read"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompts: .*p\.txt.*{complaint}|{complaint} .*p\.txt"):
        PromptList(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSON", "p.csv", "p.tsv", "p.parquet"])
def test_a_table_is_no_list_of_prompts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ValueError, match=r"prompts: .* is a table, not a list; write its prompts into a .txt, one a"):
        PromptList(tmp_path / name)
