"""`emf cache`, called in this process on a tiny BLIP3o-NEXT experiment, and the training that reads what it wrote."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.cli import main
from tests.cli.world import complaint
from tests.tiny_blip3o import save_checkpoint

EXPERIMENT = """
trainer:
  accelerator: cpu
  max_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  enable_checkpointing: false
data:
  text:
    class_path: BLIP3oNext
    init_args: {pretrained: blip3o, dtype: float32, image_size: 14, image_heads: 2}
  autoencoder: Pixels
  cache: {path: features, max_gb: 0.01, dtype: bfloat16}
  latent_cache: {path: latents, max_gb: 0.01}
  shards: shards
  resolution: 12
  batch_size: 3
  num_workers: 0
model:
  class_path: FlowMapModule
  init_args:
    objective: FlowMatching
    net:
      class_path: SanaFlowMap
      init_args:
        architecture:
          num_layers: 1
          num_attention_heads: 2
          attention_head_dim: 8
          num_cross_attention_heads: 2
          cross_attention_head_dim: 8
          patch_size: 4
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_checkpoint(tmp_path / "blip3o")
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar.gz", "w:gz") as tar:
        for number in range(7):
            pixels, file = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8), io.BytesIO()
            Image.fromarray(pixels).save(file, "jpeg")
            for name, data in ((f"{number}.jpg", file.getvalue()), (f"{number}.txt", f"{number} red cube".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_image(*arguments: object) -> None:
    raise AssertionError("an image was decoded")


def test_it_says_what_it_takes_writes_it_and_training_reads_it(world, capsys, monkeypatch):
    main(["cache", "--config", "e.yaml", "--dry_run"])
    said = capsys.readouterr().out
    assert "features of 7 samples, by dtype:" in said
    assert "relative error 0.17%  <- chosen" in said
    assert "features: 7 samples x 930 B = 6.51 kB; free: " in said
    assert "samples written" not in said
    main(["cache", "--config", "e.yaml"])
    assert "7 samples written" in capsys.readouterr().out
    main(["cache", "--config", "e.yaml"])
    assert "0 samples written; 7 were there; left out: none" in capsys.readouterr().out
    monkeypatch.setattr("emf_lightning.data.reading.streams.decode_image", no_image)
    main(["fit", "--config", "e.yaml"])


def test_processes_take_their_part_by_torchrun_s_variables(world, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        main(["cache", "--config", "e.yaml"])
        written.append(capsys.readouterr().out)
    assert "rank 1: 3 samples written" in written[0]
    assert "by dtype" not in written[0]
    assert "4 samples written" in written[1]
    assert "2 processes take a part" in written[1]


def test_each_machine_fills_caches_of_its_own(world, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    main(["cache", "--config", "e.yaml"])
    assert "rank 1: 3 samples written" in capsys.readouterr().out
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    slurm = {"SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_NUM_NODES": 2, "SLURM_PROCID": 2, "SLURM_LOCALID": 0}
    for name, value in slurm.items():
        monkeypatch.setenv(name, str(value))
    main(["cache", "--config", "e.yaml"])
    assert "4 samples written" in (said := capsys.readouterr().out)
    assert "2 processes of each of 2 machines take a part" in said


def test_machines_with_different_numbers_of_processes_are_refused(world, capsys, monkeypatch):
    for name, value in {"SLURM_STEP_NUM_TASKS": 3, "SLURM_STEP_NUM_NODES": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert "3 processes on 2 machines; start equally many on each" in complaint(capsys, "cache", "--config", "e.yaml")


def test_the_model_is_not_built(world, capsys):
    text = (world / "e.yaml").read_text()
    (world / "e.yaml").write_text(text.replace("patch_size: 4", "patch_size: 5"))  # 12 px are no multiple of 5
    main(["cache", "--config", "e.yaml", "--dry_run"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "e.yaml"])
    assert "patches of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.cache", "null", "--data.latent_cache", "null"], "nothing to fill; set data.cache"),
        (["--data.shards", "nowhere"], "'nowhere' matches no file"),
        (["--data.cache.dtype", "int8"], "data.cache"),
        (["--dry_rum"], "dry_rum"),
    ],
)
def test_errors_are_one_sentence(world, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "--config", "e.yaml", *options])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emf cache:")]
    assert message in line


def test_help_names_the_options(capsys):
    main(["cache", "--help"])
    assert "--dry_run" in capsys.readouterr().out
    main(["--help"])
    assert " ".join(capsys.readouterr().out.split()).count(" cache compute ") == 1
    assert not torch.distributed.is_initialized()
