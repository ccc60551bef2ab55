"""An exported folder in a repository of the hub, of which the hub's own cache stands in for the download."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import emf_lightning
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.weight_variants import plain_names, variant_names
from tests.hub_server import COMMIT, hub

EARLIER = Path(__file__).parent / "earlier_versions" / "export"
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
    part = export / "vae/config.json"
    part.write_text(part.read_text().replace("emf_lightning.latents.pixels.Pixels", "os.system"))
    cached(export, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"os\.system"):
        EMFPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")


# -- stock DiffusionPipeline ------------------------------------------------------------------------------------------


AFRESH = """
import sys
import torch
from diffusers import DiffusionPipeline
export, package, image = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
except ImportError as error:
    print(f"ImportError: {error}")
sys.path.append(package)
pipe = DiffusionPipeline.from_pretrained("owner/name", trust_remote_code=True)
torch.save(pipe("a red circle", num_inference_steps=1, output_type="pt").images, image)
"""


@pytest.fixture(scope="module")
def afresh(tmp_path_factory: pytest.TempPathFactory, pipe: EMFPipeline) -> tuple[str, Path]:
    """What a fresh process says that loads an export without the package, and what it draws with it, from the hub.

    -S leaves out what is installed for editing; the libraries' own folder is given by hand.
    """
    place = tmp_path_factory.mktemp("afresh")
    pipe.save_pretrained(place / "export")
    package, image = Path(emf_lightning.__file__).parents[1], place / "image.pt"
    command = [sys.executable, "-S", "-c", AFRESH, str(place / "export"), str(package), str(image)]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home"), "NO_PROXY": "*"}
    with hub("owner/name", place / "export") as address:
        environment |= {"HF_ENDPOINT": address, "PYTHONPATH": sysconfig.get_path("purelib")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, image


@pytest.mark.parametrize("options", [{}, {"custom_pipeline": "pipeline"}, {"custom_pipeline": "itself"}])
def test_stock_diffusers_loads_a_folder(pipe, export, options):
    options = {name: str(export) if value == "itself" else value for name, value in options.items()}
    loaded = DiffusionPipeline.from_pretrained(export, trust_remote_code=True, **options)
    assert isinstance(loaded, EMFPipeline)
    assert torch.equal(loaded("a red circle", **ONE_STEP).images, pipe("a red circle", **ONE_STEP).images)
    loaded.save_pretrained(export.parent / "again")
    again = EMFPipeline.from_pretrained(export.parent / "again")
    assert torch.equal(again("a red circle", **ONE_STEP).images, pipe("a red circle", **ONE_STEP).images)


def test_stock_diffusers_asks_for_trust(export):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(export)


def test_a_fresh_process_downloads_from_the_hub_what_stock_diffusers_asks_for(pipe, afresh):
    assert torch.equal(torch.load(afresh[1]), pipe("a red circle", **ONE_STEP).images)


def test_without_the_package_one_sentence_says_how_to_install_it(afresh):
    said = "ImportError: This model needs the package emf_lightning, which is not installed: pip install emf_lightning"
    assert afresh[0].strip().endswith(said)


@pytest.mark.parametrize("file", ["pipeline.py", "None.py", "vae/emf_part.py", "vae/emf_lightning.pipeline.py"])
def test_our_own_class_runs_no_code_of_a_folder(export, file):
    (export / file).write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\nraise RuntimeError('ran')\n")
    try:
        EMFPipeline.from_pretrained(export)
    except ValueError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017  # files of these names would be ignored, too
    assert not list(export.rglob("*.ran"))


def test_a_class_of_ones_own_loads_by_stock_diffusers(tmp_path, export, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "from emf_lightning.text.words import WordEncoder\n\n\nclass OwnWords(WordEncoder):\n    pass\n"
    (tmp_path / "own_words.py").write_text(own)
    config = export / "text_encoder/config.json"
    config.write_text(config.read_text().replace("emf_lightning.text.words.WordEncoder", "own_words.OwnWords"))
    loaded = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    assert type(loaded.text_encoder.part).__name__ == "OwnWords"


def test_no_path_of_this_machine_is_in_an_export(export):
    texts = {file.name: file.read_text() for file in export.rglob("*") if file.suffix in (".json", ".py")}
    assert set(texts) >= {"model_index.json", "config.json", "pipeline.py", "emf_part.py"}
    for name, text in texts.items():
        assert "_name_or_path" not in text, name
        assert not any(str(path) in text for path in (EARLIER, export.parent, tempfile.gettempdir())), name


# -- variants and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [EMFPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
def test_a_variant_lies_beside_the_whole_weights(export, pipe, load):
    half = EMFPipeline.from_pretrained(export, dtype=torch.float16)
    half.save_pretrained(export, variant="fp16")
    names = {file.name for file in (export / "transformer").glob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = load(export, variant="fp16", trust_remote_code=True)
    whole = pipe.transformer.part.state_dict()
    for name, weight in loaded.transformer.part.state_dict().items():
        assert torch.equal(weight, whole[name].half().to(weight.dtype)), name
    again = load(export, trust_remote_code=True).transformer.part.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    loaded.save_pretrained(export.parent / "resaved")
    EMFPipeline.from_pretrained(export.parent / "resaved")


def test_a_variant_that_is_not_there_is_refused(export):
    with pytest.raises(ValueError, match="variant=bf16"):
        EMFPipeline.from_pretrained(export, variant="bf16")
    with pytest.raises(ValueError, match=r"variant: '\.\./x' must be letters and digits alone"):
        EMFPipeline.from_pretrained(export).save_pretrained(export, variant="../x")


def test_the_files_of_sharded_weights_have_variants_too(tmp_path):
    stem, shard = "diffusion_pytorch_model", "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / shard)
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    variant_names(tmp_path, "fp16")
    renamed = f"{stem}.fp16-00001-of-00001.safetensors"
    assert {file.name for file in tmp_path.iterdir()} == {renamed, f"{stem}.safetensors.index.fp16.json"}
    assert json.loads((tmp_path / f"{stem}.safetensors.index.fp16.json").read_text())["weight_map"] == {"a": renamed}
    with plain_names(tmp_path, "fp16") as plain:
        weights = json.loads((plain / f"{stem}.safetensors.index.json").read_text())["weight_map"]["a"]
        assert weights == shard
        assert load_file(plain / weights)["a"] == 1


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_pipeline_computes_in_the_precision_that_it_is_loaded_in(export, pipe, name):
    loaded = EMFPipeline.from_pretrained(export, **{name: torch.bfloat16})
    assert {weight.dtype for weight in loaded.transformer.part.parameters()} == {torch.bfloat16}
    image = loaded("a red circle", **ONE_STEP).images
    assert 0 < (image - pipe("a red circle", **ONE_STEP).images).abs().max() < 0.1
