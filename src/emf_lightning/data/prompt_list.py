"""Prompts from a text file, or given one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from emf_lightning.text.plain import lines, plain


class PromptList(Dataset[tuple[int, str]]):
    """(index, prompt) of each non-blank line of a text file, or of each prompt of a list.

    Args:
        prompts: the file or the prompts.
        argument: its name in errors.

    Raises:
        ValueError: for a file that is missing, is not text, or holds no prompt.
    """

    def __init__(self, prompts: str | Path | Sequence[str], argument: str = "prompts") -> None:
        given = _read(Path(prompts).expanduser(), argument) if isinstance(prompts, str | Path) else prompts
        self.prompts = [prompt for prompt in map(plain, given) if prompt]
        if not self.prompts:
            where = repr(str(prompts)) if isinstance(prompts, str | Path) else "the list"
            raise ValueError(f"{argument}: {where} holds no prompt; give one a line")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.prompts[index]


def _read(path: Path, argument: str) -> list[str]:
    """The lines of a text file."""
    try:
        found = lines(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{argument}: cannot read {str(path)!r} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: {str(path)!r} is not UTF-8 text; give one prompt a line") from error
    if any("\0" in line for line in found):
        raise ValueError(f"{argument}: {str(path)!r} holds NUL characters, so it is not UTF-8 text; save it as UTF-8")
    return found
