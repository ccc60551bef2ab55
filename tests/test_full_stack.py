"""The shipped BLIP3o-NEXT experiment with tiny weights: shards, cache, fit, resume, test, export, generated images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning.cli import main
from emf_lightning.pipeline import EMFPipeline
from tests import tiny_checkpoints

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = str(ROOT / "experiments/emf/blip3o_next.yaml")
WATCH = """
trainer:
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs}
  callbacks+:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "kept-{step}"}
    - class_path: FewStepSampling
      init_args:
        suite: {class_path: ShapesSuite, init_args: {per_task: 2, scenes_per_task: 2}}
        steps: [1, 2, 4]
        every_n_steps: 2
        images_per_task: 1
        final_images_per_task: 1
"""
NET, TEXT = "--model.init_args.net.init_args", "--data.text.init_args"
TINY = {
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--trainer.strategy": "auto",
    "--trainer.precision": "32",
    "--trainer.max_steps": "4",
    "--trainer.val_check_interval": "2",
    "--trainer.log_every_n_steps": "1",
    "--model.init_args.optimization.scheduler.init_args.warmup": "1",
    "--model.init_args.optimization.optimizer.init_args.lr": "0.001",
    "--data.shards": "shards",
    "--data.captions": "null",
    "--data.validation_shards": "shards",
    "--data.validation_samples": "4",
    "--data.resolution": "36",
    "--data.batch_size": "4",
    "--data.num_workers": "0",
    "--data.cache.max_gb": "0.01",
    "--data.latent_cache.max_gb": "0.01",
    "--data.autoencoder.init_args.pretrained": "models/diffusers",
    "--data.autoencoder.init_args.dtype": "float32",
    f"{TEXT}.pretrained": "models/blip3o",
    f"{TEXT}.dtype": "float32",
    f"{TEXT}.image_size": "14",
    f"{TEXT}.image_heads": "2",
    f"{NET}.pretrained": "models/blip3o",
}
PROMPTS = ["a photo of a red cube", "a photo of two blue ball"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every verb has run; runs/emf/blip3o_next/version_0 is the uninterrupted run."""
    path = tmp_path_factory.mktemp("stack")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        tiny_checkpoints.blip3o_next(path / "models")
        Path("watch.yaml").write_text(WATCH)
        Path("prompts.txt").write_text("\n".join(PROMPTS))
        options = [part for option in TINY.items() for part in option]
        experiment = ["--config", EXPERIMENT, "--config", "watch.yaml", *options]
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        main(["cache", *experiment])
        main(["fit", *experiment])
        run = "runs/emf/blip3o_next/version_0"
        half = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/kept-step=2.ckpt"]
        main(["fit", *half, *version("again")])
        trained = ["--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
        main(["test", *trained, *version("tested")])
        main(["predict", *trained, *version("predicted"), "--data.prompts", "prompts.txt"])
        main(["export", "--run", run, "--out", "exported"])
    return path / "runs/emf/blip3o_next"


def version(name: str) -> list[str]:
    return ["--trainer.logger.init_args.version", name]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    state = checkpoint["state_dict"]
    assert isinstance(state, dict)
    return state


def test_what_emf_trains_moves_and_the_rest_stays(stack):
    start = tiny_checkpoints.sana(stack / "start", caption_channels=20).state_dict()
    trained = {name.removeprefix("net.transformer."): value for name, value in weights(stack / "version_0").items()}
    frozen = ("patch_embed.", "caption_projection.", "caption_norm.", "proj_out.")
    for name, value in start.items():
        assert torch.equal(trained[name], value) == name.startswith(frozen), name


def test_a_resumed_run_ends_in_the_same_weights(stack):
    whole, resumed = weights(stack / "version_0"), weights(stack / "again")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_features_and_latents_came_from_the_caches(stack):
    from tests.callbacks.tiny import events

    logged = events(stack / "version_0")
    assert [scalar.value for scalar in logged.Scalars("train/cache_hits")][-1] >= 16, "four batches of four"
    assert [scalar.value for scalar in logged.Scalars("train/cache_misses")][-1] == 6, "the suite's prompts alone"
    assert "train/mse_r_below_t" in logged.Tags()["scalars"]


def test_images_and_scores_at_one_two_and_four_steps(stack):
    records = [json.loads(line) for line in (stack / "version_0/shapes/scores.jsonl").read_text().splitlines()]
    assert {(record["step"], record["label"]) for record in records} == {
        (step, f"{steps}step") for step in (0, 2, 4) for steps in (1, 2, 4)
    }
    assert {record["nfe"] for record in records} == {2, 4, 8}, "guidance doubles the evaluations"
    tested = [json.loads(line) for line in (stack / "tested/shapes/scores.jsonl").read_text().splitlines()]
    assert [record["label"] for record in tested if record["stage"] == "test"] == ["1step", "2step", "4step"]
    assert (stack / "version_0/shapes/contact_sheet.png").stat().st_size > 10_000


def test_the_exported_pipeline_generates_the_images_of_predict(stack):
    exported = stack.parents[2] / "exported"
    (stack.parents[2] / "models").rename(stack.parents[2] / "gone")  # the exported folder needs no other files
    pipe = EMFPipeline.from_pretrained(str(exported))
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 2, 4):
        images = pipe(PROMPTS, num_inference_steps=steps).images
        for number, image in enumerate(images):
            predicted = np.asarray(Image.open(stack / f"predicted/samples/{number:05d}-{steps}step.png"))
            assert np.array_equal(np.asarray(image), predicted)
    for file in ("transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json", "README.md"):
        assert (exported / file).is_file()
