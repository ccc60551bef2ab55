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
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, **options))
    except (OSError, HFValidationError) as error:
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        raise ValueError(
            f"{name!r} is no folder, and no repository of the hub that can be downloaded ({reason})"
        ) from error


def check_pushing(name: str) -> None:
    """Raises ``ValueError`` for what is no name of a repository, and while the hub is turned off."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push: {name!r} is no name of a repository, owner/name") from error
    if "/" not in name:
        raise ValueError(f"push: {name!r} is no name of a repository, owner/name")
    if is_offline_mode():
        raise ValueError(f"push: {name} cannot be uploaded, as HF_HUB_OFFLINE turns the hub off; unset it")


def pushed(folder: Path, name: str) -> str:
    """Uploads a folder to the repository ``name``, which is made if it is not there; returns its address.

    Raises:
        ValueError: where the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of emf_lightning")
    except Exception as error:  # of the hub, of the connection, or of a login
        raise ValueError(
            f"push: {folder} is written, but {name} cannot be uploaded ({shorten(' '.join(str(error).split()), 200)}); "
            "log in with `hf auth login`, then run `hf upload`"
        ) from error
    return str(address)
