"""Exported folders on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emf_lightning.text.plain import shorten

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
"""Options of diffusers' ``from_pretrained`` that concern the download."""


def downloaded(name: str, **options: Any) -> Path:
    """The folder ``name``, or a copy of the repository ``name`` of the hub in its cache; no code of it runs.

    Args:
        name: a folder, or ``owner/name``.
        **options: some of ``DOWNLOAD_OPTIONS``.

    Raises:
        ValueError: for a name that is neither, or a repository that cannot be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, **options))
    except (OSError, HFValidationError) as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(
            f"{name!r} is no folder, and no repository of the hub that can be downloaded ({reason})"
        ) from error
