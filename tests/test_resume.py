"""A killed run resumes from its last checkpoint and ends with the weights of a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from tests.forked import Forked, emf

STEPS = 12
CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: {steps}
  max_epochs: -1
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
    - class_path: EMAWeightAveraging
      init_args: {{decay: 0.9}}
    - class_path: ModelCheckpoint
      init_args: {{dirpath: {root}, every_n_train_steps: 2, save_last: true, save_top_k: 1, filename: newest}}
model:
  class_path: {kind}
  init_args:
    {settings}
    optimization:
      scheduler:
        class_path: WarmupCosine
        init_args: {{total: {steps}, warmup: 2}}
    net:
      class_path: SanaFlowMap
      init_args:
        time_scale: 10
        prediction: {{class_path: PredictData}}
        {network}
data:
  shards: {shards}
  batch_size: 8
  num_workers: 1
  shuffle_block: 16
  text: {{class_path: WordEncoder, init_args: {{width: 16, length: 10}}}}
  autoencoder: {{class_path: Pixels}}
  cache: {{path: {root}/cache, max_gb: 0.1}}
"""


ARCHITECTURE = SanaArchitecture(
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=8,
    num_cross_attention_heads=1,
    cross_attention_head_dim=8,
)
SIZE = f"architecture: {json.dumps(asdict(ARCHITECTURE))}"

MODELS = {
    "FlowMapModule": ("FlowMapModule", "caption_dropout: 0.1", SIZE),
    "FGM": ("FGM", "alternation: {auxiliary_updates: 2}", SIZE),
    "SCFlow": (
        "SCFlow",
        "discriminator: {class_path: ConvDiscriminator, init_args: {channels: 4, max_channels: 8}}",
        SIZE,
    ),
    "adapters": ("FlowMapModule", "caption_dropout: 0.1", "adapter: {rank: 2}\n        pretrained: %s/parent"),
}
"""The class of each model, its settings in addition to the common ones, and its network's."""


class Waits(Callback):
    """Comes no further than half of the steps: a kill is never too late."""

    def on_train_batch_start(self, trainer, *_):
        while trainer.global_step >= STEPS // 2:
            time.sleep(1)


def start(model: str, root: Path, shards: Path, *options: str) -> Forked:
    root.mkdir(exist_ok=True)
    config, (kind, settings, network) = root / "run.yaml", MODELS[model]
    if model == "adapters":
        network %= root.parent
    names = {"kind": kind, "settings": settings, "network": network, "root": root, "shards": shards, "steps": STEPS}
    config.write_text(CONFIG.format(**names))
    return Forked(emf, "fit", "--config", str(config), *options)


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    rest = checkpoint.get("target", {})  # EMA target of SCFlow's consistency loss
    return (
        checkpoint["state_dict"]
        | {f"target {k}": v for k, v in rest.items()}
        | {f"live {k}": v for k, v in checkpoint["current_model_state"].items()}
    )


@pytest.mark.parametrize(
    "model", ["FlowMapModule", *(pytest.param(m, marks=pytest.mark.slow) for m in ("FGM", "SCFlow", "adapters"))]
)
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, model):
    shards = tmp_path / "shards"
    write_shards(
        SMALL, shards, 40, seed=0, samples_per_shard=20
    )  # five batches an epoch: the run crosses two epoch ends
    parent = SanaFlowMap(ARCHITECTURE, prediction=PredictData(), time_scale=10.0, latent_size=36, context_width=16)
    parent.save_pretrained(tmp_path / "parent")
    assert start(model, tmp_path / "whole", shards).wait() == 0

    killed = start(
        model, tmp_path / "killed", shards, "--trainer.callbacks+", json.dumps({"class_path": f"{__name__}.Waits"})
    )
    last = tmp_path / "killed" / "last.ckpt"
    while not last.exists():
        assert killed.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    reached = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
    assert 0 < reached < STEPS

    assert start(model, tmp_path / "killed", shards, "--ckpt_path", str(last)).wait() == 0
    whole, resumed = weights(tmp_path / "whole" / "last.ckpt"), weights(last)
    assert whole.keys() == resumed.keys()
    assert (model == "adapters") == any(".lora_A." in name for name in whole)
    assert not any(".base_layer." in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
