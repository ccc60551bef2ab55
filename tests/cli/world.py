"""A tiny but real experiment and helpers that call the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from emf_lightning.cli import main

BASE = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 2
  max_epochs: -1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: tiny}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {save_last: true}
data:
  text: {class_path: WordEncoder, init_args: {width: 16}}
  autoencoder: Pixels
  shards: shards
  batch_size: 8
  num_workers: 0
model:
  class_path: FlowMapModule
  init_args:
    objective: {class_path: FlowMatching}
    optimization:
      scheduler:
        class_path: WarmupCosine
        init_args: {total: "${trainer.max_steps}", warmup: 0}
    net:
      class_path: SanaFlowMap
      init_args:
        architecture:
          num_layers: 1
          num_attention_heads: 2
          attention_head_dim: 8
          num_cross_attention_heads: 2
          cross_attention_head_dim: 8
"""

CHILD = """
base: ../base.yaml
trainer:
  callbacks+:
    - class_path: SampleWriter
      init_args: {steps: [1, 2]}
model:
  init_args:
    caption_dropout: 0.25
"""


PARENT = str(Path(__file__).resolve().parents[2] / "experiments/shapes/parent")
CHECKPOINT = "runs/tiny/version_0/checkpoints/last.ckpt"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a command that has to end with status 2 and one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emf ")]
    assert len(lines) == 1
    return lines[0]
