"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from emf_lightning.text.plain import lines, plain


class PromptList(Dataset[tuple[int, str]]):
    """(index, prompt) of each non-blank line of a text file.

    Raises:
        ValueError: for a file that is missing, is not text, or holds no prompt.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        try:
            prompts = list(map(plain, lines(path.read_bytes().decode("utf-8-sig"))))
        except OSError as error:
            raise ValueError(f"prompts: cannot read {str(path)!r} ({error.strerror}); give a text file") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts: {str(path)!r} is not UTF-8 text; give one prompt a line") from error
        if any("\0" in prompt for prompt in prompts):
            raise ValueError(f"prompts: {str(path)!r} holds NUL characters, so it is not UTF-8 text; save it as UTF-8")
        self.prompts = [prompt for prompt in prompts if prompt]
        if not self.prompts:
            raise ValueError(f"prompts: {str(path)!r} holds no prompt; give one a line")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.prompts[index]
