"""Prompts from a text file, or given one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from emf_lightning.data.reading.kept_arrays import Arrays, TextRows, Texts, kept_arrays
from emf_lightning.text.plain import plain


class PromptList(Dataset[tuple[int, str]]):
    """(index, prompt) of each non-blank line of a text file, or of each prompt of a list.

    The prompts of a large file are mapped from the disk, see ``kept_arrays``.

    Args:
        prompts: the file or the prompts.
        argument: its name in errors.

    Raises:
        ValueError: for a file that is missing, is a table or no text, or holds no prompt.
    """

    def __init__(self, prompts: str | Path | Sequence[str], argument: str = "prompts") -> None:
        self.prompts: Sequence[str]
        if isinstance(prompts, str | Path):
            path = Path(prompts).expanduser()
            arrays = kept_arrays([path], "prompts", partial(_read, path, argument))
            self.prompts = Texts(arrays["data"], arrays["ends"])
        else:
            self.prompts = [prompt for prompt in map(plain, prompts) if prompt]
        if not self.prompts:
            where = repr(str(prompts)) if isinstance(prompts, str | Path) else "the list"
            raise ValueError(f"{argument}: {where} holds no prompt; give one a line")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.prompts[index]


_TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")


def _read(path: Path, argument: str) -> Arrays:
    """The prompts in a text file, whose lines end at line feeds alone."""
    if path.suffix.lower() in _TABLES:
        raise ValueError(f"{argument}: {str(path)!r} is a table, not a list; write its prompts into a .txt, one a line")
    rows, is_text = TextRows(), True
    try:
        with path.open("rb") as file:
            for line in file:
                is_text &= b"\0" not in line
                if prompt := plain(line.decode()):
                    rows.add(prompt)
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {str(path)!r} is not UTF-8 text; give one prompt a line") from error
    if not is_text:
        raise ValueError(f"{argument}: {str(path)!r} holds NUL characters, so it is not UTF-8 text; save it as UTF-8")
    data, ends = rows.arrays()
    return {"data": data, "ends": ends}
