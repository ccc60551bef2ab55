"""Arguments of a part that are files, folders or texts, as an export keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from emf_lightning.cli.model_card import _is_hub_data_set
from emf_lightning.exported_files import found, kept
from emf_lightning.pipeline_part import PipelinePart
from emf_lightning.text.base import TextEncoder
from emf_lightning.text.degraded import DegradedEncoder
from emf_lightning.text.pretrained import PretrainedTextEncoder
from emf_lightning.text.stable_diffusion import FluxTextEncoder
from tests import pipelines
from tests.text.test_pretrained import make_model, save_tokenizer


def qwen(folder) -> str:
    make_model("qwen3").eval().save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def moved(part: TextEncoder, spec, tmp_path) -> PipelinePart:
    """``part`` written, read from another place, without what it was built from."""
    PipelinePart(part, spec).save_pretrained(tmp_path / "written/text_encoder")
    shutil.move(tmp_path / "written", tmp_path / "moved")
    shutil.move(tmp_path / "source", tmp_path / "gone")
    return PipelinePart.from_pretrained(tmp_path / "moved/text_encoder")


def spec(name: str, **arguments):
    return {"class_path": f"emf_lightning.text.{name}", "init_args": arguments}


def test_a_text_longer_than_any_file_name_stays_a_text(tmp_path):
    arguments = {"model": qwen(tmp_path / "source"), "length": 8, "template": "a red cube under " * 40 + "{caption}"}
    part = PretrainedTextEncoder(**arguments)
    loaded = moved(part, spec("pretrained.PretrainedTextEncoder", **arguments), tmp_path).part
    assert loaded.template == arguments["template"]


def test_an_encoder_within_another_moves_with_it(tmp_path):
    inner = {"model": qwen(tmp_path / "source"), "length": 8}
    part = DegradedEncoder(PretrainedTextEncoder(**inner), noise=0.5)
    nested = spec("degraded.DegradedEncoder", encoder=spec("pretrained.PretrainedTextEncoder", **inner), noise=0.5)
    captions = ["a red cube", "two ring"]
    expected = part(captions).context
    assert torch.equal(moved(part, nested, tmp_path).part(captions).context, expected)


def test_of_a_whole_pipeline_the_text_encoders_alone_are_copied(tmp_path):
    pipelines.flux(tmp_path / "source")
    arguments = {"pretrained": str(tmp_path / "source")}
    part = FluxTextEncoder(**arguments)
    expected = part(["a photo of a cat"]).context
    loaded = moved(part, spec("stable_diffusion.FluxTextEncoder", **arguments), tmp_path).part
    assert torch.equal(loaded(["a photo of a cat"]).context, expected)
    copied = {path.name for path in (tmp_path / "moved/text_encoder/pretrained.files").iterdir() if path.is_dir()}
    assert copied == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}


def test_lists_of_files_are_found_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text(name)
    folder = tmp_path / "part"
    value = [str(tmp_path / "a/same.txt"), str(tmp_path / "b/same.txt"), 3]
    first, second, number = found(kept(value, folder, "files.files"), folder)
    assert (Path(first).read_text(), Path(second).read_text(), number) == ("a", "b", 3)


def test_a_folder_of_data_that_is_gone_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--owner--pictures").mkdir()
    assert _is_hub_data_set("owner/pictures")
    assert not _is_hub_data_set("data/pictures")
