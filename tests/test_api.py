"""The public names: lazy, documented, with examples that run; and the README's first example."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import emf_lightning
from emf_lightning.callbacks import SampleWriter
from emf_lightning.cli import main
from tests.callbacks import tiny

CONFIG = """
trainer:
  max_steps: 1
  max_epochs: -1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: runs, name: shapes/demo}}
  callbacks: [{class_path: ModelCheckpoint, init_args: {save_last: true}}]
data:
  text: {class_path: WordEncoder, init_args: {width: 16}}
  autoencoder: {class_path: Pixels}
  shards: shards
  batch_size: 8
  num_workers: 0
model:
  class_path: FlowMapModule
  init_args:
    net:
      class_path: SanaFlowMap
      init_args:
        architecture: {num_layers: 1, num_attention_heads: 2, attention_head_dim: 8,
                       num_cross_attention_heads: 2, cross_attention_head_dim: 8}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run and an exported run, under the names that the examples use."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.shards(Path("shards"))
        Path("experiment.yaml").write_text(CONFIG)
        main(["fit", "--config", "experiment.yaml"])
        main(["export", "--run", "runs/shapes/demo/version_0", "--out", "export"])
    return folder


@pytest.mark.parametrize("name", emf_lightning.__all__)
def test_every_public_name_has_an_example_that_runs(name, home, monkeypatch):
    monkeypatch.chdir(home)
    thing = getattr(emf_lightning, name)
    names = {public: getattr(emf_lightning, public) for public in emf_lightning.__all__}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", {"torch": torch, **names}, name, None, 0)
    assert test.examples, f"{name} has no example"
    torch.manual_seed(0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.failed == 0


@pytest.mark.parametrize("name", emf_lightning.__all__)
def test_every_public_name_says_what_its_arguments_are(name):
    thing = getattr(emf_lightning, name)
    text = inspect.getdoc(thing) or ""
    arguments = [
        parameter
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.name not in ("self", "args", "kwargs")
    ]
    missing = [argument.name for argument in arguments if not re.search(rf"\b{argument.name}\b", text)]
    inherited = [argument for argument in missing if "see ``" in text]
    assert missing == inherited


def test_the_mathematics_imports_neither_lightning_nor_diffusers():
    code = (
        "import sys, emf_lightning\n"
        "assert 'torch' not in sys.modules\n"
        "from emf_lightning import AdaptiveWeighting, AlphaFlow, FiniteDifference, FlowMatching, ForwardMode\n"
        "from emf_lightning import FlowGeneratorMatching, ImprovedMeanFlow, LogitNormalTimes, MeanFlow, sample\n"
        "heavy = {'lightning', 'diffusers', 'transformers', 'torchmetrics', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_do_not_exist_are_attribute_errors():
    with pytest.raises(AttributeError, match="NoSuchObjective"):
        emf_lightning.NoSuchObjective  # noqa: B018


def test_the_readme_s_example_learns_in_one_step(root):
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(blocks[0], "README.md", "exec"), names)
    images, x = names["images"], names["x"]
    assert ((images > 0) == (x > 0)).float().mean() > 0.95
    assert (images - x).square().mean() < 0.4


def test_a_loaded_run_samples_as_predict_does_and_as_the_trained_module(home, monkeypatch):
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(home)
    Path("prompts.txt").write_text("a photo of a red circle\n")
    run = "runs/shapes/demo/version_0"
    options = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    writer = f'{{"class_path": "SampleWriter", "init_args": {{"steps": [2], "folder": "{home}/samples"}}}}'
    main(["predict", *options, "--data.prompts", "prompts.txt", "--trainer.callbacks+", writer])
    state = torch.random.get_rng_state()
    image = emf_lightning.load_run(run).sample("a photo of a red circle", steps=2)[0]
    assert torch.equal(torch.random.get_rng_state(), state), "loading a run leaves the random state alone"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open("samples/00000-2step.png")))

    model = tiny.meanflow()
    trainer = tiny.trainer(home / "trained", SampleWriter(), max_steps=1)
    trainer.fit(model, datamodule=tiny.data(home / "shards"))
    model.train()
    both = model.sample(["a photo of a red circle", "a blue square"], steps=1, images_per_prompt=2)
    assert len(both) == 4
    assert model.net.training
    assert both[2] == model.sample("a blue square", steps=1)[0]


def test_sampling_without_a_datamodule_or_anything_to_sample_is_refused(home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=r"load_run\(folder\)"):
        tiny.meanflow().sample("a red circle")
    with pytest.raises(ValueError, match="nothing to generate"):
        emf_lightning.load_run("runs/shapes/demo/version_0").sample([], steps=1)
    with pytest.raises(ValueError, match="nowhere is not there"):
        emf_lightning.load_run("nowhere")
