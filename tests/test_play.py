"""The page of `emf play`, and of an export's app.py."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import Namespace
from PIL import Image

from emf_lightning import EMFPipeline, load_run
from emf_lightning.cli import main
from emf_lightning.cli.played_run import example_prompts, run_model
from emf_lightning.digests import write_digests
from emf_lightning.play import PROMPTS, Drawn, PlayedModel, draw, exported_model
from tests.cli.world import BASE

PROMPT = "a photo of a red circle"
RUN = "runs/tiny/version_0"
FROM_CHECKPOINT = """
base: child.yaml
trainer: {logger: {init_args: {name: from_checkpoint}}}
data: {prompts: prompts.txt}
model: {init_args: {init_from: runs/tiny/version_0/checkpoints/last.ckpt, objective: MeanFlow}}
"""
FROM_NETWORK = """
base: child.yaml
trainer: {logger: {init_args: {name: from_network}}}
model: {init_args: {net: {init_args: {pretrained: runs/tiny/version_0/network, architecture: null}}}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow-matching run with guidance 2, MeanFlow from its checkpoint, a run from its network, and an export."""
    path = tmp_path_factory.mktemp("played")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        own = BASE.replace("init_args: {save_last: true}", "init_args: {save_last: true}\n    - SaveNetwork")
        Path("child.yaml").write_text(own)
        Path("prompts.txt").write_text(f"{PROMPT}\na photo of a blue cross\n")
        Path("from_checkpoint.yaml").write_text(FROM_CHECKPOINT)
        Path("from_network.yaml").write_text(FROM_NETWORK)
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        main(["fit", "--config", "child.yaml", "--model.init_args.guidance_scale", "2"])
        main(["fit", "--config", "from_checkpoint.yaml"])
        main(["fit", "--config", "from_network.yaml"])
        main(["export", "--run", "runs/from_checkpoint", "--out", "exported"])
        main(["export", "--run", RUN, "--out", "exported_parent"])
        main(["export", "--run", "runs/from_checkpoint", "--out", "both", "--parent", "exported_parent"])
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_a_list_of_prompts_gives_the_examples(tmp_path) -> None:
    (tmp_path / "two.txt").write_text("a circle\na square\n")
    for prompts in (["a circle", "a square"], str(tmp_path / "two.txt")):
        settings = Namespace(data=Namespace(prompts=prompts))
        assert example_prompts(tmp_path, settings) == ["a circle", "a square"]
    assert example_prompts(tmp_path, Namespace(data=Namespace(prompts="none.txt"))) == []


# -- the functions behind the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["from_checkpoint", "from_network"])
def test_the_images_are_those_of_the_run_and_of_its_parent(run) -> None:
    model = run_model(Path("runs") / run).to("cpu")
    drawn = list(draw(model, PROMPT, seed=3))
    own, parent = load_run(f"runs/{run}"), load_run(RUN)
    expected = [own.sample(PROMPT, steps=steps, seed=3)[0] for steps in (1, 2, 4, 30)]
    expected.append(parent.sample(PROMPT, steps=30, seed=3)[0])
    assert model.headings == ["1 step", "2 steps", "4 steps", "30 steps", "parent, 30 steps"]
    assert [one.nfe for one in drawn] == [1, 2, 4, 30, 60]
    assert [one.guidance_scale for one in drawn] == [1, 1, 1, 1, 2]
    assert all(one.seconds > 0 for one in drawn)
    for one, image in zip(drawn, expected, strict=True):
        assert np.array_equal(pixels(one.image), pixels(image))
    assert str(Path(RUN)) in model.remark


def test_seed_and_guidance_change_the_images_and_the_evaluations() -> None:
    model = run_model(Path("runs/from_checkpoint")).to("cpu")
    first, other, again = (next(draw(model, PROMPT, seed=seed)) for seed in (0, 1, 0))
    assert np.array_equal(pixels(first.image), pixels(again.image))
    assert not np.array_equal(pixels(first.image), pixels(other.image))
    assert [one.nfe for one in draw(model, PROMPT, 0, 1.5, 1)] == [2, 4, 8, 60, 30]


@pytest.mark.parametrize("seed", [None, 0.5])
def test_a_seed_that_is_no_whole_number_is_refused(seed) -> None:
    with pytest.raises(ValueError, match=r"seed: .* is no whole number"):
        next(draw(PlayedModel("", pipeline=None), PROMPT, seed))  # type: ignore[arg-type]


def test_a_run_from_scratch_has_no_parent() -> None:
    model = run_model(Path(RUN)).to("cpu")
    assert model.parent is None and "no parent" in model.remark
    assert len(list(draw(model, PROMPT))) == 4


def test_a_parent_that_is_gone_is_left_out_with_the_reason(tmp_path, monkeypatch) -> None:
    config = Path("runs/from_checkpoint/version_0/config.yaml")
    gone = tmp_path / "run"
    (gone / "checkpoints").mkdir(parents=True)
    (gone / "config.yaml").write_text(config.read_text().replace(f"{RUN}/checkpoints/last.ckpt", "gone.ckpt"))
    (gone / "checkpoints/last.ckpt").symlink_to((config.parent / "checkpoints/last.ckpt").resolve())
    model = run_model(gone).to("cpu")
    assert model.parent is None and "gone.ckpt" in model.remark
    image = load_run(config.parent).sample(PROMPT, steps=1)[0]
    assert np.array_equal(pixels(next(draw(model, PROMPT)).image), pixels(image))


def test_an_exported_folder_is_played_with_the_prompts_of_its_run() -> None:
    model = exported_model(Path("exported"), "cpu")
    assert model.name == "from_checkpoint" and "holds no parent" in model.remark
    assert model.prompts == [PROMPT, "a photo of a blue cross"] and Path("exported", PROMPTS).is_file()
    expected = EMFPipeline.from_pretrained("exported")(PROMPT, num_inference_steps=2).images[0]
    assert np.array_equal(pixels(list(islice(draw(model, PROMPT), 2))[1].image), pixels(expected))
    assert len(Path("exported/app.py").read_text().splitlines()) <= 25


def test_an_exported_folder_shows_the_parent_that_it_is_given() -> None:
    model = exported_model(Path("exported"), "cpu", parent="exported_parent")
    assert model.headings[-1] == "parent, 30 steps" and model.remark == "The parent is exported_parent."
    *_, parent = draw(model, PROMPT, seed=3)
    assert (parent.nfe, parent.guidance_scale) == (60, 2)
    assert np.array_equal(pixels(parent.image), pixels(load_run(RUN).sample(PROMPT, steps=30, seed=3)[0]))
    assert "parent=Path(__file__).parent / '../exported_parent'" in Path("both/app.py").read_text()


@pytest.mark.parametrize("parent", ["gone", "owner/gone", "runs"])
def test_an_exported_folders_parent_that_cannot_be_loaded_is_left_out_with_the_reason(parent) -> None:
    model = exported_model(Path("exported"), "cpu", parent=parent)
    assert model.parent is None and model.remark.startswith("The parent is left out: ")


def test_a_parent_of_other_latents_is_left_out(tmp_path) -> None:
    shutil.copytree("exported_parent", tmp_path / "other")
    index = tmp_path / "other/model_index.json"
    index.write_text(index.read_text().replace('"latent_size": 36', '"latent_size": 24'))
    write_digests(tmp_path / "other")
    model = exported_model(Path("exported"), "cpu", parent=tmp_path / "other")
    assert model.parent is None and "cannot start from the same noise" in model.remark


def test_the_parent_of_an_export_must_be_an_exported_folder_or_a_hub_name(capsys) -> None:
    for parent in ("runs/tiny", "no name", "a/b/c"):
        with pytest.raises(SystemExit):
            main(["export", "--run", RUN, "--out", "new", "--parent", parent])
        assert f"parent: {parent} is no exported folder, and no name of the hub" in capsys.readouterr().err
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("size", "shown"), [((36, 36), (252, 252)), ((36, 24), (252, 168)), ((300, 20), (300, 20)), ((1024, 512),) * 2]
)
def test_a_small_image_is_enlarged_by_whole_pixels(size, shown) -> None:
    image = Image.effect_noise(size, 50)
    drawn = Drawn(image, 0.01234, 1, 1.0)
    assert drawn.shown.size == shown
    assert np.array_equal(pixels(drawn.shown.resize(size, Image.Resampling.NEAREST)), pixels(image))


@pytest.mark.parametrize(
    ("nfe", "guidance", "caption"),
    [(1, 1, "0.0123 s, 1 evaluation"), (60, 1.5, "0.0123 s, 60 evaluations, guidance 1.5")],
)
def test_the_caption_says_time_evaluations_and_guidance(nfe, guidance, caption) -> None:
    assert Drawn(Image.new("RGB", (1, 1)), 0.01234, nfe, guidance).caption == caption


def test_without_gradio_one_sentence_names_the_command(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as `import gradio` finds no such package
    with pytest.raises(SystemExit) as end:
        main(["play", RUN])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1 and "pip install 'emf_lightning[play]'" in error


# -- the page ---------------------------------------------------------------------------------------------------------


@contextmanager
def served(*command: str) -> Iterator[str]:
    """The address of the page that ``command`` serves."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRADIO_SERVER_NAME": "127.0.0.1"}
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not (found := re.search(r"http://[\d.]+:\d+", said)):
                assert select.select([process.stdout], [], [], 240)[0], said
                line = process.stdout.readline()
                assert line, said
                said += line
            yield found[0]
        finally:
            process.terminate()


@pytest.mark.slow  # a process of its own, which imports torch and gradio
@pytest.mark.parametrize(
    ("command", "inputs", "evaluations"),
    [
        (("-m", "emf_lightning", "play", "runs/from_checkpoint"), (PROMPT, 3, 1, 2), [1, 2, 4, 30, 60]),
        (("exported/app.py",), (PROMPT, 3, 1.5), [2, 4, 8, 60]),
        (("both/app.py",), (PROMPT, 3, 1.5, 2), [2, 4, 8, 60, 60]),
    ],
)
def test_the_page_answers_with_images_and_their_numbers(command, inputs, evaluations) -> None:
    client = pytest.importorskip("gradio_client")
    pytest.importorskip("gradio")
    with served(*command) as address:
        api = client.Client(address, verbose=False, analytics_enabled=False)
        answer = api.predict(*inputs, api_name="/draw")
        images, captions = answer[::2], answer[1::2]
        assert [int(re.findall(r"(\d+) evaluation", one)[0]) for one in captions] == evaluations
        expected = load_run("runs/from_checkpoint").sample(PROMPT, steps=1, seed=3, guidance_scale=inputs[2])[0]
        with Image.open(images[0]) as image:
            assert np.array_equal(pixels(image.convert("RGB").resize(expected.size, 0)), pixels(expected))
        assert len({Path(one).read_bytes() for one in images}) == len(images)
        with pytest.raises(Exception, match="seed: None is no whole number"):
            api.predict(PROMPT, None, *inputs[2:], api_name="/draw")
