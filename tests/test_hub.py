"""An exported folder in a repository of the hub, of which the hub's own cache stands in for the download."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from emf_lightning.pipeline import EMFPipeline

EARLIER = Path(__file__).parent / "earlier_versions" / "export"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE_STEP = {"num_inference_steps": 1, "output_type": "pt"}


def cached(export: Path, cache: Path, name: str = "owner/name") -> Path:
    """Puts a folder into a cache as the hub's download does: blobs, and a snapshot of links to them."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    snapshot = place / "snapshots" / COMMIT
    for number, file in enumerate(sorted(path for path in export.rglob("*") if path.is_file())):
        blob = place / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(export)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(scope="module")
def pipe() -> EMFPipeline:
    loaded = EMFPipeline.from_pretrained(EARLIER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def export(tmp_path: Path, pipe: EMFPipeline) -> Path:
    """A folder as this version writes it."""
    pipe.save_pretrained(tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize("options", [{}, {"revision": "main"}, {"revision": COMMIT, "local_files_only": True}])
def test_a_repository_of_the_hub_loads_by_its_name(tmp_path, pipe, export, options):
    cached(export, tmp_path / "cache")
    loaded = EMFPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache", **options)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("a red circle", **ONE_STEP).images, pipe("a red circle", **ONE_STEP).images)


@pytest.mark.parametrize("name", ["owner/other", "nothing", "path/to/nothing", "/nowhere", "../export"])
def test_a_name_that_is_nowhere_is_refused_in_a_sentence(tmp_path, name):
    with pytest.raises(ValueError, match=f"^'{name}' is no folder, and no repository of the hub that can be"):
        EMFPipeline.from_pretrained(name, cache_dir=tmp_path)


def test_a_revision_that_is_not_there_is_refused(tmp_path, export):
    cached(export, tmp_path / "cache")
    with pytest.raises(ValueError, match="no repository of the hub that can be downloaded"):
        EMFPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache", revision="other")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", b"cut", "is damaged"),
        ("model_index.json", b'{"_class_name": "StableDiffusionPipeline"}', "is damaged"),
        ("digests.json", b"{", "digests.json"),
    ],
)
def test_a_damaged_repository_is_refused_as_a_folder_is(tmp_path, export, file, content, said):
    snapshot = cached(export, tmp_path / "cache")
    (snapshot / file).resolve().write_bytes(content)
    with pytest.raises(ValueError, match=said):
        EMFPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")


def test_a_repository_that_names_a_strangers_class_is_refused(tmp_path, export):
    (export / "digests.json").unlink()
    part = next(file for file in (export / "vae").glob("*.json") if "class_path" in file.read_text())
    part.write_text(part.read_text().replace("emf_lightning.latents.pixels.Pixels", "os.system"))
    cached(export, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"os\.system"):
        EMFPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
