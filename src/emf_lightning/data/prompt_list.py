"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset


class PromptList(Dataset[tuple[int, str]]):
    """(index, prompt) of each non-blank line of a text file.

    Raises:
        ValueError: for a file that is missing, is not text, or holds no prompt.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"prompts: cannot read {str(path)!r} ({error.strerror}); give a text file") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {str(path)!r} is not UTF-8 text; give one prompt a line") from error
        self.prompts = [line.strip() for line in lines if line.strip()]
        if not self.prompts:
            raise ValueError(f"prompts: {str(path)!r} holds no prompt; give one a line")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.prompts[index]
