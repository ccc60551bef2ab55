"""Lines of the tables that `emf plan` prints."""

from __future__ import annotations


def row(name: str, value: str, remark: str = "") -> str:
    """A line of a table."""
    return f"  {name:<28} {value:>18}  {remark}".rstrip()


def gb(size: float) -> str:
    """A number of bytes."""
    if size >= 1e12:
        return f"{size / 1e12:.3g} TB"
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
