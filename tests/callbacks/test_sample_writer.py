from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.callbacks import SampleWriter
from emf_lightning.callbacks.sampling.image_generation import generate_images
from emf_lightning.evaluation.sampling_config import sampling_configs
from tests.callbacks import tiny

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a cross above a diamond"]


@pytest.fixture
def data(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return tiny.data(tmp_path / "none", prompts=prompts)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_every_prompt_has_a_images_at_every_step_count_named_by_its_line(data, tmp_path):
    writer = SampleWriter(steps=[1, 2], images_per_prompt=2)
    tiny.trainer(tmp_path / "run", writer).predict(tiny.meanflow(), datamodule=data, return_predictions=False)

    folder = tmp_path / "run" / "samples"
    names = {f"0000{i}-{n}step{suffix}.png" for i in range(3) for n in (1, 2) for suffix in ("", "-1")}
    assert {path.name for path in folder.glob("*.png")} == names
    assert {row["file"] for row in rows(folder)} == names
    assert [row["prompt"] for row in rows(folder)[::4]] == PROMPTS
    assert all(row["nfe"] == row["steps"] for row in rows(folder))


def test_images_are_those_of_the_fixed_noise(data, tmp_path):
    model = tiny.meanflow()
    trainer = tiny.trainer(tmp_path / "run", SampleWriter(steps=[2], seed=3))
    trainer.predict(model, datamodule=data, return_predictions=False)

    data.batch_size = 1
    model.eval()
    with torch.no_grad():
        (generated,) = generate_images(trainer, model, [PROMPTS[1]], [0], sampling_configs([2], None), seed=3)
    written = np.asarray(Image.open(tmp_path / "run" / "samples" / "00001-2step.png"))
    assert abs(written.astype(int) - generated.images[0]).max() <= 1


def test_guidance_scales_beyond_the_first_are_in_the_names(data, tmp_path):
    writer = SampleWriter(steps=[1], guidance_scale=[1.0, 3.0], folder=tmp_path / "elsewhere")
    tiny.trainer(tmp_path / "run", writer).predict(tiny.meanflow(), datamodule=data, return_predictions=False)

    assert {(row["file"][6:], row["nfe"]) for row in rows(tmp_path / "elsewhere")} == {
        ("1step.png", 1),
        ("1step_cfg3.png", 2),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equal_lines_are_further_images_of_the_prompt_in_any_batch(tmp_path, batch_size):
    lines = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    data = tiny.data(tmp_path / "none", prompts=tmp_path / "prompts.txt")
    data.batch_size = batch_size
    writer, model = SampleWriter(steps=[2], images_per_prompt=2), tiny.meanflow()
    trainer = tiny.trainer(tmp_path / "run", writer)
    trainer.predict(model, datamodule=data, return_predictions=False)

    folder = tmp_path / "run" / "samples"
    names = [f"{line:05d}-2step{suffix}.png" for line in range(5) for suffix in ("", "-1")]
    written = np.stack([np.asarray(Image.open(folder / name), np.int16) for name in names])
    model.eval()
    captions = [line for line in lines for _ in range(2)]
    with torch.no_grad():
        (expected,) = generate_images(
            trainer, model, captions, [0, 1, 0, 1, 2, 3, 4, 5, 2, 3], sampling_configs([2], None), seed=0
        )
    assert np.abs(written - expected.images).max() <= 1
    assert len({image.tobytes() for image in written}) == 10
