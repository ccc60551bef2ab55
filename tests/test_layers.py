from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports


def test_imports_point_to_the_right_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)

    assert lint_imports(no_cache=True) == 0
