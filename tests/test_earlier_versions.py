"""A checkpoint and an exported folder that version 0.1.0 wrote before names changed still load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.cli import main
from emf_lightning.modules.fgm import FGM
from emf_lightning.pipeline import EMFPipeline
from tests.callbacks import tiny

FILES = Path(__file__).parent / "earlier_versions"
EXPERIMENT = """
trainer:
  accelerator: cpu
  max_steps: 3
  max_epochs: -1
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: run, save_last: true}}]
data:
  text: {class_path: WordEncoder, init_args: {width: 8, length: 10, window: 1}}
  autoencoder: {class_path: Pixels, init_args: {scale: 0.5, shift: 0.2}}
  shards: shards
  batch_size: 4
  num_workers: 0
model:
  class_path: FGM
  init_args:
    objective: {class_path: FlowGeneratorMatching, init_args: {generator_time: 0.7}}
    alternation: {auxiliary_updates: 2}
    optimization: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}}
    net:
      class_path: SanaFlowMap
      init_args:
        time_scale: 5
        attention_backend: math
        prediction: {class_path: PredictData, init_args: {min_time: 0.1}}
        interval: {class_path: SummedInterval}
        architecture: {num_layers: 1, num_attention_heads: 1, attention_head_dim: 4,
                       num_cross_attention_heads: 1, cross_attention_head_dim: 4}
"""


def test_an_exported_folder_generates_the_images_that_it_did():
    pipe = EMFPipeline.from_pretrained(str(FILES / "export"))
    pipe.set_progress_bar_config(disable=True)
    output = pipe("a photo of a red circle", num_inference_steps=2)
    expected = np.asarray(Image.open(FILES / "red_circle-2step.png"), np.int16)
    assert np.abs(np.asarray(output.images[0], np.int16) - expected).max() <= 1
    assert expected.std() > 3
    assert output.nfe == 2, "Improved MeanFlow takes guidance as a condition"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.shards(Path("shards"))
    Path("experiment.yaml").write_text(EXPERIMENT)
    return tmp_path


def test_training_resumes_from_a_checkpoint_with_both_networks_and_their_counts(folder, monkeypatch):
    saved = torch.load(FILES / "fgm.ckpt", weights_only=True)
    started = {}

    def on_train_start(module: FGM) -> None:
        started["steps"] = module.trainer.global_step, module.auxiliary_steps
        started["weights"] = {name: value.clone() for name, value in module.online_flow.state_dict().items()}

    monkeypatch.setattr(FGM, "on_train_start", on_train_start)
    main(["fit", "--config", "experiment.yaml", "--ckpt_path", str(FILES / "fgm.ckpt")])
    assert started["steps"] == (2, 4)
    for name, value in started["weights"].items():
        assert torch.equal(value, saved["state_dict"][f"critic.{name}"]), name
    now = torch.load("run/last.ckpt", weights_only=True)
    assert (now["global_step"], now["auxiliary_steps"]) == (3, 6)
    assert len(now["optimizer_states"]) == 2


def test_a_network_starts_from_a_checkpoint(folder):
    main(["fit", "--config", "experiment.yaml", "--model.init_args.init_from", str(FILES / "fgm.ckpt")])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.init_args.generator_time=0.7", "model.init_args.objective.init_args.generator_time"),
        ("model.init_args.critic_updates=2", "model.init_args.alternation.auxiliary_updates"),
        ("model.init_args.net.init_args.math_attention=true", "attention_backend; write math for true, null for false"),
        ("data.text.init_args.reach=1", "data.text.init_args.window"),
        ("data.autoencoder.init_args.offset=0.2", "data.autoencoder.init_args.shift"),
    ],
)
def test_an_old_key_is_refused_in_one_sentence_that_names_the_new_one(folder, capsys, old, new):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "experiment.yaml", f"--{old}"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{old.partition('=')[0]} is now " in line
    assert line.endswith(new)


@pytest.mark.parametrize("old", ["MeanFlow", "FlowMatching", "ImprovedMeanFlow"])
def test_an_old_module_is_refused_with_the_objective_that_replaces_it(folder, capsys, old):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "experiment.yaml", "--model", old])
    assert f"{old} is now FlowMapModule, with the objective {old}" in capsys.readouterr().err
