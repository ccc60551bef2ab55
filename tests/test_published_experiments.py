"""Experiments of published size, trained for two steps from their own files with local data and tiny weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from emf_lightning.cli import main
from tests import pipelines

SMALL_UNET = {"channels": "[8,16]", "attention": "[false,true]", "groups": "4", "layers": "1"}


ONE_DEVICE = {"trainer.devices": "1", "trainer.strategy": "auto"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets, prompts and pipelines in the layouts that users download."""
    place = tmp_path_factory.mktemp("published")
    pipelines.stable_diffusion_15(place / "sd15")
    pipelines.stable_diffusion_3(place / "sd3")
    pipelines.flux(place / "flux")
    pipelines.vae(place / "vae", scaling_factor=0.18215)
    pipelines.cifar10(place / "cifar10")
    pipelines.celeba_hq(place / "celebahq")
    (place / "prompts.txt").write_text("a red cat\na blue dog\ntwo cat and a dog\na photo of a cat\n" * 2)
    main(["images", "--dataset", str(place / "cifar10"), "--out", str(place / "shards/cifar10"), "--caption", "label"])
    main(["images", "--dataset", str(place / "celebahq"), "--out", str(place / "shards/celebahq")])
    main(["captions", "--prompts", str(place / "prompts.txt"), "--out", str(place / "shards/prompts")])
    return place


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(root)


def fit(experiment: str, out: Path, shards: Path, *overlays: Path, **settings: str) -> Path:
    """Trains two steps of an experiment and returns the run directory."""
    files = [part for file in (f"experiments/{experiment}.yaml", *overlays) for part in ("--config", str(file))]
    model = {"model.init_args.optimization.scheduler.init_args.warmup": "0"}
    common = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": "2",
        "trainer.val_check_interval": "2",
        "trainer.default_root_dir": str(out / experiment),
        "data.shards": str(shards),
        "data.validation_shards": "null",
        "data.batch_size": "4",
        "data.num_workers": "0",
    }
    options = [part for name, value in (common | model | settings).items() for part in (f"--{name}", value)]
    main(["fit", *files, *options])
    return out / experiment / "version_0"


def trained(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values() if value.is_floating_point())
    assert (run / "network/config.json").is_file()
    return checkpoint["state_dict"]


def net(**settings: str) -> dict[str, str]:
    return {f"model.init_args.net.init_args.{name}": value for name, value in settings.items()}


def small_unet() -> dict[str, str]:
    return {f"model.init_args.net.init_args.architecture.{name}": value for name, value in SMALL_UNET.items()}


def pictures(dataset: Path, out: Path) -> None:
    from datasets import load_dataset

    out.mkdir()
    for i, sample in enumerate(load_dataset(str(dataset), split="train")):
        sample["img" if "img" in sample else "image"].save(out / f"{i}.png")


def small_fid(name: str, out: Path, reference: Path, **replaced: str) -> Path:
    """The overlay fid_NAME_in_training.yaml with few images, and features that need no download."""
    overlay = yaml.safe_load(Path(f"experiments/parts/fid_{name}_in_training.yaml").read_text())
    (callback,) = overlay["trainer"]["callbacks+"]
    counts = {"every_n_steps": 1, "images_per_task": 4, "final_images_per_task": 6, "figures": False}
    callback["init_args"] |= counts | replaced
    (metric, *_) = callback["init_args"]["extra_metrics"]
    del metric["init_args"]["features"]
    metric["init_args"] |= {"reference": str(reference), "resolution": 16}
    callback["init_args"]["extra_metrics"] = [metric]
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return path


def fids(run: Path) -> set[tuple[int, int]]:
    """(steps, images) of the scores of the training, without those before its first step."""
    rows = [json.loads(line) for line in (run / "prompts/scores.jsonl").read_text().splitlines()]
    later = [row for row in rows if row["step"]]
    assert all(row["metrics"]["fid_random"]["values"]["score"] >= 0 for row in later)
    return {(row["steps"], row["images"]) for row in later}


def test_cifar10_teacher_and_generator_train(place, tmp_path):
    shards = place / "shards/cifar10"
    teacher = fit("fgm/cifar10_teacher", tmp_path, shards, **small_unet())
    trained(teacher)
    pictures(place / "cifar10", tmp_path / "png")
    overlay = small_fid("cifar10", tmp_path, tmp_path / "png")
    run = fit("fgm/cifar10", tmp_path, shards, overlay, **net(pretrained=str(teacher / "network")))
    names = {name.partition(".")[0] for name in trained(run)}
    assert names == {"net", "online_flow"}
    assert fids(run) == {(1, 4), (1, 6)}


def test_celebahq_teacher_and_student_train(place, tmp_path):
    shards, latents = place / "shards/celebahq", {"data.autoencoder.init_args.pretrained": str(place / "vae")}
    small = {"data.resolution": "16"} | latents
    teacher = fit(
        "scflow/celebahq_teacher",
        tmp_path,
        shards,
        **small,
        **small_unet(),
        **net(**{"architecture.head_channels": "8"}),
    )
    trained(teacher)
    discriminator = {f"model.init_args.discriminator.init_args.{name}": "8" for name in ("channels", "max_channels")}
    now = {f"model.init_args.objective.init_args.{term}.start": "0" for term in ("backward", "alignment")}
    pictures(place / "celebahq", tmp_path / "png")
    overlay = small_fid("celebahq", tmp_path, tmp_path / "png")
    start = net(pretrained=str(teacher / "network"))
    run = fit("scflow/celebahq", tmp_path, shards, overlay, **small, **discriminator, **now, **start)
    trained(run)
    assert fids(run) == {(steps, images) for steps in (1, 2, 4) for images in (4, 6)}


def test_text_to_image_student_trains(place, tmp_path):
    pipeline = str(place / "sd15")
    settings = {
        "data.resolution": "16",
        "data.text.init_args.pretrained": pipeline,
        "data.autoencoder.init_args.pretrained": pipeline,
        "model.init_args.objective.init_args.backward.start": "0",
        "model.init_args.objective.init_args.adversarial.start": "0",
        **ONE_DEVICE,
    }
    pictures(place / "cifar10", tmp_path / "png")
    overlay = small_fid("coco", tmp_path, tmp_path / "png", prompts=str(place / "prompts.txt"))
    start = net(**{"pretrained.path": pipeline})
    run = fit("scflow/coco", tmp_path, place / "shards/cifar10", overlay, **settings, **start)
    trained(run)
    assert fids(run) == {(steps, images) for steps in (1, 2, 4) for images in (4, 6)}


def test_sd3_generator_trains_on_captions_alone(place, tmp_path):
    pipeline = str(place / "sd3")
    settings = {
        "data.resolution": "16",
        "data.text.init_args.pretrained": pipeline,
        "data.text.init_args.t5_length": "12",
        "data.autoencoder.init_args.pretrained": pipeline,
        "data.cache.path": str(tmp_path / "cache"),
        "data.cache.max_gb": "0.1",
        "model.init_args.alternation.micro_batches": "2",
        **ONE_DEVICE,
    }
    trained(fit("fgm/sd3", tmp_path, place / "shards/prompts", **settings, **net(**{"pretrained.path": pipeline})))


def test_meanflow_trains_on_cifar10_and_its_fid_is_a_curve(place, tmp_path):
    pictures(place / "cifar10", place / "png")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"""
trainer:
  callbacks-: [FewStepSampling]
  callbacks+:
    - class_path: FewStepSampling
      init_args:
        prompts: [a picture]
        steps: [1, 2]
        every_n_steps: 1
        images_per_task: 4
        final_images_per_task: 6
        at_start: false
        figures: false
        extra_metrics: [{{class_path: FrechetDistance, init_args: {{reference: {place / "png"}, resolution: 32}}}}]
""")
    run = fit("meanflow/cifar10", tmp_path, place / "shards/cifar10", overlay, **ONE_DEVICE, **small_unet())
    assert any(".interval." in name for name in trained(run))
    scores = [json.loads(line) for line in (run / "prompts/scores.jsonl").read_text().splitlines()]
    assert {(row["steps"], row["images"]) for row in scores} == {(1, 4), (2, 4), (1, 6), (2, 6)}


def test_meanflow_trains_on_flux_with_its_time_embedding_fitted(place, tmp_path):
    pipeline = str(place / "flux")
    settings = {
        "data.resolution": "16",
        "data.text.init_args.pretrained": pipeline,
        "data.text.init_args.t5_length": "12",
        "data.autoencoder.init_args.pretrained": pipeline,
        "data.cache.path": str(tmp_path / "cache"),
        "data.cache.max_gb": "0.1",
        "trainer.num_nodes": "1",
    }
    shards = place / "shards/cifar10"
    run = fit("meanflow/flux_lite", tmp_path, shards, **ONE_DEVICE, **settings, **net(**{"pretrained.path": pipeline}))
    assert any(".interval." in name for name in trained(run))
    config = json.loads((run / "network/config.json").read_text())
    assert config["_flow_time_scale"] == 1 and config["_flow_interval"] == "AnchoredInterval()"


def test_meanflow_trains_on_sd3(place, tmp_path):
    pipeline = str(place / "sd3")
    settings = {
        "data.resolution": "16",
        "data.text.init_args.pretrained": pipeline,
        "data.text.init_args.t5_length": "12",
        "data.autoencoder.init_args.pretrained": pipeline,
        "data.cache.path": str(tmp_path / "cache"),
        "data.cache.max_gb": "0.1",
    }
    shards = place / "shards/cifar10"
    run = fit("meanflow/sd35", tmp_path, shards, **ONE_DEVICE, **settings, **net(**{"pretrained.path": pipeline}))
    assert any(".interval." in name for name in trained(run))


def test_captions_are_classes_or_a_text(place):
    import tarfile

    def captions(name: str) -> set[str]:
        with tarfile.open(place / "shards" / name / "data-000000.tar") as tar:
            members = [member for member in tar if member.name.endswith(".txt")]
            return {tar.extractfile(member).read().decode() for member in members}

    assert captions("cifar10") == {"a photo of an airplane", "a photo of an automobile", "a photo of a bird"}
    assert captions("celebahq") == {"a photo"}
    assert captions("prompts") == {line.strip() for line in (place / "prompts.txt").read_text().splitlines()}
    assert json.loads((place / "shards/cifar10/manifest.json").read_text())["rows"] == 24


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().err


def test_what_cannot_be_read_is_one_sentence(place, tmp_path, capsys):
    out = str(tmp_path / "out")
    cifar = str(place / "cifar10")
    assert "cannot read split 'train' of nowhere" in said(capsys, "images", "--dataset", "nowhere", "--out", out)
    assert "cannot read split 'dev'" in said(capsys, "images", "--dataset", cifar, "--split", "dev", "--out", out)
    assert "neither text nor classes" in said(capsys, "images", "--dataset", cifar, "--caption", "img", "--out", out)
    there = str(place / "shards/celebahq")
    assert "holds other samples" in said(capsys, "images", "--dataset", cifar, "--out", there)
    assert not os.listdir(tmp_path), "nothing is left where nothing was read"
