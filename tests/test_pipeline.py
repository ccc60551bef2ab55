"""An exported run generates the images of `emf predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PipelineQuantizationConfig, SanaTransformer2DModel
from PIL import Image

from emf_lightning import load_run
from emf_lightning.cli import main
from emf_lightning.cli.export import _figures
from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.objectives.improved_meanflow import ImprovedMeanFlow
from emf_lightning.flow.sampling import EulerSampler
from emf_lightning.modules.generation import AUTOCAST
from emf_lightning.networks.sana import SanaFlowMap
from emf_lightning.part_classes import spec_of
from emf_lightning.pipeline import EMFPipeline, PipelinePart
from tests.callbacks.tiny import SIZE

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  precision: {precision}
  max_steps: 2
  max_epochs: -1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: runs, name: {name}}}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{save_last: true}}
    - class_path: WeightEMA
      init_args: {{decay: 0.5}}
    - class_path: SampleWriter
      init_args: {{steps: [1, 2], images_per_prompt: 2, seed: 3}}
data:
  text: {{class_path: WordEncoder, init_args: {{width: 16}}}}
  autoencoder: {{class_path: Pixels, init_args: {{scale: 0.5, shift: 0.2}}}}
  shards: shards
  batch_size: 8
  num_workers: 0
model:
  class_path: FlowMapModule
  init_args:
    guidance_scale: {guidance}
    objective: {{class_path: {objective}}}
    optimization: {{optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.05}}}}}}
    net:
      class_path: SanaFlowMap
      init_args:
        time_scale: 5
        prediction: {{class_path: PredictData, init_args: {{min_time: 0.1}}}}
        interval: {{class_path: SummedInterval}}
        architecture:
          num_layers: 1
          num_attention_heads: 2
          attention_head_dim: 8
          num_cross_attention_heads: 2
          cross_attention_head_dim: 8
"""
SCORES = """
trainer:
  callbacks+:
    - class_path: FewStepSampling
      init_args:
        suite: {class_path: ShapesSuite, init_args: {per_task: 2, scenes_per_task: 2}}
        steps: [1, 2]
        images_per_task: 1
        final_images_per_task: 1
"""
PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
RUNS = {
    "meanflow": {"objective": "MeanFlow", "guidance": 1.0, "precision": "32-true"},
    "guided": {"objective": "FlowMatching", "guidance": 2.5, "precision": "bf16-mixed"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that trained, predicted and were exported."""
    path = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("prompts.txt").write_text("\n".join(PROMPTS))
        Path("scores.yaml").write_text(SCORES)
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        for name, settings in RUNS.items():
            Path(f"{name}.yaml").write_text(CONFIG.format(name=name, **settings))
            scored = ["--config", "scores.yaml"] if name == "guided" else []
            main(["fit", "--config", f"{name}.yaml", *scored])
            run = f"runs/{name}/version_0"
            last = f"{run}/checkpoints/last.ckpt"
            options = ["--config", f"{run}/config.yaml", "--ckpt_path", last, "--data.prompts", "prompts.txt"]
            main(["predict", *options, "--trainer.logger.init_args.version", "predicted"])
            main(["export", "--run", run, "--out", f"{name}"])
    return path


def predicted(world: Path, run: str, steps: int) -> np.ndarray:
    """Images of both prompts, two each, as `emf predict` wrote them."""
    folder = world / f"runs/{run}/predicted/samples"
    names = [f"{prompt:05d}-{steps}step{'-1' * image}.png" for prompt in range(2) for image in range(2)]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names])


@pytest.fixture(scope="module")
def pipelines(world: Path) -> dict[str, EMFPipeline]:
    loaded = {name: EMFPipeline.from_pretrained(str(world / name)) for name in RUNS}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_pipeline_generates_the_images_of_predict(world, pipelines, run, steps):
    options = {"num_inference_steps": steps, "seed": 3}
    output = pipelines[run](PROMPTS, num_images_per_prompt=2, **options)
    first = pipelines[run](PROMPTS, **options)
    expected = predicted(world, run, steps)
    # predict has one image of each prompt in a batch: in a batch of both, some CPUs round products differently
    assert np.array_equal(np.stack(first.images), expected[::2])
    assert np.abs(np.stack(output.images).astype(int) - expected).max() <= 1
    assert expected.std() > 3, "nothing would be shown by blank images"
    assert output.nfe == steps * (2 if run == "guided" else 1)


def test_a_prompts_image_is_the_same_alone_and_from_its_own_noise(pipelines):
    pipe = pipelines["meanflow"]
    both = pipe(PROMPTS, num_inference_steps=2, output_type="pt").images
    alone = pipe(PROMPTS[1], num_inference_steps=2, output_type="pt").images
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    assert not torch.equal(pipe(PROMPTS[1], num_inference_steps=2, output_type="pt", seed=1).images, alone)


def test_a_repeated_prompt_takes_the_next_noise(pipelines):
    pipe = pipelines["meanflow"]
    options = {"num_inference_steps": 1, "output_type": "latent"}
    several = pipe(PROMPTS[0], num_images_per_prompt=4, **options).images
    assert torch.allclose(pipe([PROMPTS[0]] * 4, **options).images, several, atol=1e-5)
    assert torch.allclose(pipe([PROMPTS[0]] * 2, num_images_per_prompt=2, **options).images, several, atol=1e-5)
    mixed = pipe([PROMPTS[0], PROMPTS[1], PROMPTS[0]], **options).images
    assert torch.allclose(mixed[::2], several[:2], atol=1e-5)
    assert len({image.numpy().tobytes() for image in several}) == 4


def test_noise_may_come_from_a_generator_or_be_given(pipelines):
    pipe = pipelines["meanflow"]
    noise = torch.randn(1, 3, 36, 36, generator=torch.Generator().manual_seed(7))
    given = pipe(PROMPTS[0], latents=noise, output_type="latent").images
    sampled = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(7), output_type="latent").images
    assert torch.equal(given, sampled)
    with pytest.raises(ValueError, match=r"latents must be \[1, 3, 36, 36\], got \[2, 3, 36, 36\]"):
        pipe(PROMPTS[0], latents=noise.expand(2, -1, -1, -1))


def test_guidance_can_be_set_and_counts_its_evaluations(pipelines):
    pipe = pipelines["guided"]
    plain = pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    guided = pipe(PROMPTS, num_inference_steps=2, output_type="pt")
    assert (plain.nfe, guided.nfe) == (2, 4)
    assert not torch.equal(plain.images, guided.images)


def sampling(pipe: EMFPipeline) -> dict:
    return {name: pipe.config[name] for name in ("sampler", "guidance", "guidance_scale")}


def test_the_bar_counts_evaluations(pipelines, capsys):
    pipe = EMFPipeline(**pipelines["guided"].components, **sampling(pipelines["guided"]), latent_size=36)
    pipe(PROMPTS[0], num_inference_steps=2)
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [{"prompt": []}, {"prompt": "a", "num_inference_steps": 0}])
def test_no_prompt_is_refused(pipelines, arguments):
    with pytest.raises(ValueError, match="nothing to generate"):
        pipelines["meanflow"](**arguments)


@pytest.fixture(scope="module")
def doors(world, pipelines) -> dict[str, Callable[[Any], np.ndarray]]:
    """The ways from prompts in Python to images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        module = load_run("runs/meanflow/version_0")
    pipe = pipelines["meanflow"]
    return {
        "the pipeline": lambda prompts: np.stack(pipe(prompts, num_inference_steps=1).images),
        "a loaded run": lambda prompts: np.stack(module.sample(prompts, steps=1)),
    }


@pytest.mark.parametrize("door", ["the pipeline", "a loaded run"])
@pytest.mark.parametrize(
    ("prompts", "same_as"),
    [
        (["a \ud83d cat", "a \udfff"], ["a \ufffd cat", "a \ufffd"]),
        ("\ud83d\ude00", "\U0001f600"),
        (["\ufeffa red circle"], ["a red circle"]),
        ("", [""]),
        (["", "a", ""], ("", "a", "")),
        (np.array(PROMPTS), PROMPTS),
        (dict.fromkeys(PROMPTS).keys(), PROMPTS),
        (["a <end_of_text> cat </s>"], ["a <end_of_text> cat </s>"]),
        (["a\u2028b\x85c\n"], ["a\u2028b\x85c\n"]),
    ],
)
def test_any_text_is_a_prompt(doors, door, prompts, same_as):
    assert np.array_equal(doors[door](prompts), doors[door](same_as))


@pytest.mark.parametrize("door", ["the pipeline", "a loaded run"])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", None], r"^prompt: number 1 is NoneType \(None\), no text; leave it out, or give '' "),
        ([float("nan")], r"number 0 is float \(nan\), no text"),
        (["a", "b", 7], r"number 2 is int \(7\), no text"),
        ([b"a cat"], "number 0 is bytes"),
        ([["a cat"]], "number 0 is list"),
        ([["x" * 500_000]], r"number 0 is list \(.{40}\.\.\. \(500,004 characters\)\), no text"),
        (None, "^prompt: NoneType is no text; give a string, or a list of strings"),
        (7, "^prompt: int is no text"),
        (b"a cat", "^prompt: bytes is no text"),
        ({"a": "cat"}, "^prompt: dict is no text"),
        (["a", "b\0c"], "number 1 holds NUL characters"),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(doors, door, prompts, message):
    with pytest.raises(ValueError, match=message):
        doors[door](prompts)


def test_offloading_asks_for_each_part_in_its_turn(pipelines, monkeypatch):
    """On a CPU accelerate's hooks have nothing to move; that they are called is all that can be seen."""
    from accelerate.hooks import CpuOffload

    pipe = EMFPipeline(**pipelines["meanflow"].components, **sampling(pipelines["meanflow"]), latent_size=36)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS[0], output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu:0")
    asked = []
    move = CpuOffload.pre_forward

    def noted(hook, module, *args, **kwargs):
        asked.append(type(module.part).__name__)
        return move(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", noted)
    for part in pipe.components.values():  # what was attached looks the method up on its class
        part._hf_hook = CpuOffload("cpu", getattr(part._hf_hook, "prev_module_hook", None))
    assert torch.equal(pipe(PROMPTS[0], output_type="pt").images, expected)
    assert list(dict.fromkeys(asked)) == ["WordEncoder", "SanaFlowMap", "Pixels"]


def test_the_network_is_in_diffusers_format(world):
    stock, info = SanaTransformer2DModel.from_pretrained(
        str(world / "meanflow"), subfolder="transformer", output_loading_info=True
    )
    assert stock.config.num_attention_heads == 2
    assert not info["missing_keys"]
    assert all(key.startswith("time_embed.interval.") for key in info["unexpected_keys"])
    index = json.loads((world / "meanflow/model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "EMFPipeline"]


def test_the_card_says_what_it_is_and_how_well_it_generates(world):
    card = (world / "guided/README.md").read_text()
    assert "| objective | FlowMatching |" in card
    assert "| shapes | 2 | 4 | 2.5 | " in card
    assert "samples in some 30 network steps" in card and "num_inference_steps=30" in card and "meanflow" not in card
    few = (world / "meanflow/README.md").read_text()
    assert "samples in 1, 2 or 4 network steps" in few and "- few-step" in few
    for figure in ("contact_sheet", "step_counts", "training_curves"):
        assert f"(shapes_{figure}.png)" in card
        assert (world / f"guided/shapes_{figure}.png").is_file()


def test_the_card_of_an_earlier_checkpoint_has_no_later_scores(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    run = Path(shutil.copytree("runs/guided", tmp_path / "run")) / "version_0"
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 1
    torch.save(checkpoint | {"global_step": 1}, tmp_path / "early.ckpt")
    scores = run / "shapes/scores.jsonl"
    at_one = json.loads(scores.read_text().splitlines()[-1]) | {"step": 1}
    scores.write_text(json.dumps(at_one) + "\n" + scores.read_text())
    main(["export", "--run", str(run), "--checkpoint", str(tmp_path / "early.ckpt"), "--out", str(tmp_path / "out")])
    card, whole = (tmp_path / "out/README.md").read_text(), Path("guided/README.md").read_text()
    assert "| optimiser steps | 1 |" in card
    assert "model-index" in card and ", step 1 |" in card and ", step 2 |" not in card
    assert f"| optimiser steps | {checkpoint['global_step']} |" in whole and "model-index" in whole


def test_an_export_has_the_runs_figures_and_not_its_samples(tmp_path):
    for file in ("shapes/contact_sheet.png", "diagnosis/diagnosis.png", "samples/00000-1step.png"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    (tmp_path / "samples/prompts.jsonl").touch()
    assert [figure.name for figure in _figures(tmp_path)] == ["diagnosis.png", "contact_sheet.png"]


def test_a_run_that_is_none_and_a_folder_that_is_full_are_refused(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    for options, said in (
        (["--run", "runs", "--out", "new"], "no config.yaml in runs"),
        (["--run", "runs/meanflow/version_0", "--out", "meanflow"], "meanflow is there already"),
        (
            ["--run", "runs/meanflow/version_0", "--out", "new", "--checkpoint", "none.ckpt"],
            "no checkpoint at none.ckpt",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["export", *options])
        assert said in capsys.readouterr().err


def test_every_objectives_own_sampler_is_kept(pipelines):
    """FGM renoises, SCFlow steps along u(z, t, t), Improved MeanFlow is told its guidance."""
    from emf_lightning.modules.fgm import FGM
    from emf_lightning.modules.flow_map import FlowMapModule
    from emf_lightning.modules.scflow import SCFlow
    from tests.modules.test_scflow import discriminator

    def network(**settings):
        torch.manual_seed(0)
        return SanaFlowMap(SIZE, context_width=16, **settings).eval()

    parts = {name: part for name, part in pipelines["meanflow"].components.items() if name != "transformer"}
    noise, outputs = torch.randn(1, 3, 36, 36), []
    conditioned = ImprovedMeanFlow(sampling_interval=(0.2, 0.7))
    for module in (
        FGM(network(), FlowGeneratorMatching(generator_time=0.8)),
        SCFlow(network(), discriminator),
        FlowMapModule(network(guidance_conditioning=True), conditioned, guidance_scale=3.0),
    ):
        kind = type(module)
        pipe = EMFPipeline(
            transformer=PipelinePart(module.net, {}),
            **parts,
            sampler=spec_of(module.objective.sampler),
            guidance=spec_of(module.objective.sampling_guidance),
            guidance_scale=module.guidance_scale,
            latent_size=36,
        )
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(2)
        outputs.append(pipe(PROMPTS[0], num_inference_steps=2, latents=noise, output_type="latent"))
        text = [parts["text_encoder"].part(captions) for captions in ([PROMPTS[0]], [""])]
        torch.manual_seed(2)
        assert torch.equal(outputs[-1].images, module.sample_latents(*text, noise, 2)), kind
    assert [output.nfe for output in outputs] == [2, 2, 2]


def test_an_unconditional_unet_over_a_kl_autoencoder_is_exported_too(tmp_path, pipelines):
    """What comes from diffusers' classes is written in their format, however the experiment started."""
    from diffusers import AutoencoderKL

    from emf_lightning.latents.kl import KLAutoencoder
    from emf_lightning.networks.unet import UNetArchitecture, UNetFlowMap
    from emf_lightning.text.no_text import NoText

    torch.manual_seed(0)
    stages = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=stages[0],
        up_block_types=stages[1],
    ).save_pretrained(str(tmp_path / "whole/vae"))
    autoencoder = KLAutoencoder(str(tmp_path / "whole"), subfolder="vae")
    size = UNetArchitecture([8, 8], [False, True], layers=1, groups=4)
    net = UNetFlowMap(size, latent_channels=4, latent_size=8).eval()
    start = {"latent_channels": 4, "latent_size": 8, "architecture": {"channels": [8, 8]}}
    where = {"pretrained": str(tmp_path / "whole"), "subfolder": "vae"}
    EMFPipeline(
        PipelinePart(net, {"class_path": "emf_lightning.networks.unet.UNetFlowMap", "init_args": start}),
        PipelinePart(autoencoder, {"class_path": "emf_lightning.latents.kl.KLAutoencoder", "init_args": where}),
        PipelinePart(NoText(), {"class_path": "emf_lightning.text.no_text.NoText"}),
        sampler=spec_of(EulerSampler()),
        guidance=spec_of(ClassifierFreeGuidance()),
        latent_size=8,
    ).save_pretrained(str(tmp_path / "exported"))
    pipe = EMFPipeline.from_pretrained(str(tmp_path / "exported"))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8)
    t = torch.ones(1)
    with torch.no_grad():
        expected = noise - net(noise, t, t, torch.zeros(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
        assert torch.equal(pipe("", num_inference_steps=1, latents=noise, output_type="latent").images, expected)
        image = (autoencoder.decode(expected) / 2 + 0.5).clamp(0, 1)
        assert torch.equal(pipe("", num_inference_steps=1, latents=noise, output_type="pt").images, image)


def test_every_name_of_a_precision_is_the_same_to_an_export():
    from lightning.fabric.connector import _PRECISION_INPUT_STR_ALIAS_CONVERSION as ALIASES

    assert {"bf16", "16"} <= ALIASES.keys()
    assert all(AUTOCAST.get(alias) == AUTOCAST.get(name) for alias, name in ALIASES.items())


def test_a_device_is_taken_from_device_map_and_a_split_is_refused(world):
    folder = world / "meanflow"
    part = PipelinePart.from_pretrained(folder / "transformer", device_map={"": "meta"})
    assert {weight.device.type for weight in part.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"device_map: 'balanced' would split the parts; give one device"):
        EMFPipeline.from_pretrained(folder, device_map="balanced")


def test_a_checkpoint_of_a_run_is_found_by_its_name(world, monkeypatch):
    monkeypatch.chdir(world)
    run = "runs/meanflow/version_0"
    expected = load_run(run, f"{run}/checkpoints/epoch=0-step=2.ckpt").sample(PROMPTS[:1], steps=1)[0]
    for name in ("epoch=0-step=2.ckpt", "checkpoints/epoch=0-step=2.ckpt"):
        found = load_run(run, name).sample(PROMPTS[:1], steps=1)[0]
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_quantization_is_refused_instead_of_left_out(world):
    config = PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}, ["transformer"])
    with pytest.raises(ValueError, match="quantization_config: transformer cannot be quantized while it is loaded"):
        EMFPipeline.from_pretrained(world / "meanflow", quantization_config=config)
