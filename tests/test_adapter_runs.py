"""Adapters by the command line: fit, resume, export with and without the parent; and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emf_lightning import load_run
from emf_lightning.cli import main
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.pipeline import EMFPipeline
from tests.cli.world import complaint
from tests.test_pipeline import CONFIG, RUNS

RUN = "runs/adapters/version_0"
NET = "model.init_args.net.init_args"
ONE_STEP = {"num_inference_steps": 1, "output_type": "pt"}


def config() -> str:
    text = CONFIG.format(name="adapters", **RUNS["meanflow"]).replace("SummedInterval", "AnchoredInterval")
    net = "        adapter: {rank: 4, alpha: 6}\n        pretrained: parent\n"
    return text[: text.index("        architecture:")] + net


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained adapters, and its exports."""
    path = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        torch.manual_seed(0)
        settings = {"prediction": PredictData(min_time=0.1), "time_scale": 5.0, "context_width": 16}
        SanaFlowMap(SanaArchitecture(1, 2, 8, 2, 8), **settings).save_pretrained("parent")
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        Path("adapters.yaml").write_text(config())
        main(["fit", "--config", "adapters.yaml"])
        main(["export", "--run", RUN, "--out", "exported"])
        main(["export", "--run", RUN, "--out", "merged", "--merge", "true"])
    return path


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "world" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("world"))


def images(source: Path) -> Any:
    pipe = EMFPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    return pipe(["a red circle", "a blue square"], **ONE_STEP).images


def test_an_export_holds_adapters_alone_or_merged_the_whole_network(world):
    adapters = {path.name for path in (world / "exported/transformer").iterdir()}
    assert {"pytorch_lora_weights.safetensors", "trained_weights.safetensors"} < adapters
    assert "diffusion_pytorch_model.safetensors" not in adapters
    assert json.loads((world / "exported/transformer/config.json").read_text())["_flow_adapter"]["adapter"]["rank"] == 4
    assert "diffusion_pytorch_model.safetensors" in {path.name for path in (world / "merged/transformer").iterdir()}
    assert "_flow_adapter" not in (world / "merged/transformer/config.json").read_text()

    expected = load_run(RUN).sample(["a red circle", "a blue square"], steps=1)
    both, whole = images(world / "exported"), images(world / "merged")
    assert [image.size for image in expected] == [(36, 36)] * 2
    torch.testing.assert_close(whole, both, rtol=1e-4, atol=1e-5)


def test_the_card_says_what_the_folder_holds(world):
    assert 'load_lora_weights("exported", subfolder="transformer", ' in (world / "exported/README.md").read_text()
    assert "load_lora_weights" not in (world / "merged/README.md").read_text()


def test_a_merged_export_starts_new_adapters_and_the_adapters_go_on(world):
    Path("null.yaml").write_text("model: {init_args: {net: {init_args: {adapter: null}}}}\n")
    for source, options in (("merged", []), ("exported", ["--config", "null.yaml"])):
        start = [f"--{NET}.pretrained", f"{source}/transformer", "--trainer.logger.init_args.name", source]
        main(["fit", "--config", "adapters.yaml", *options, *start])
        saved = torch.load(f"runs/{source}/version_0/checkpoints/last.ckpt", weights_only=True)
        assert saved["parent"] == {"merged": "merged/transformer", "exported": str(Path("parent").resolve())}[source]
        assert all("base_layer" not in name for name in saved["state_dict"])


def test_a_finished_run_goes_on_from_its_checkpoint(world):
    last = f"{RUN}/checkpoints/last.ckpt"
    options = ["--trainer.max_steps", "3", "--trainer.logger.init_args.version", "longer"]
    main(["fit", "--config", f"{RUN}/config.yaml", "--ckpt_path", last, *options])
    saved = torch.load("runs/adapters/longer/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--{net}.adapter.target_modules", "[to_qq]"], "'to_qq' ends the name of no linear layer"),
        (["--{net}.adapter.rank", "0"], "rank must be at least 1, got 0"),
        (["--{net}.adapter.dropout", "0.1"], "Adapter has no option 'dropout'"),
        (["--{net}.finetuning.trainable", "[transformer_blocks]"], "finetuning.trainable changes weights that stay"),
    ],
)
def test_a_mistake_is_one_line(world, capsys, options, said):
    options = [option.format(net=NET) for option in options]
    assert said in complaint(capsys, "fit", "--config", "adapters.yaml", *options)


def test_what_nobody_could_load_is_not_pushed(world, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said = complaint(capsys, "export", "--run", RUN, "--out", "pushed", "--push", "owner/name")
    assert "adapters on parent, a folder of this machine" in said and "add --merge" in said
    assert not (world / "pushed").exists()


# -- two processes ----------------------------------------------------------------------------------------------------


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative error over all tensors."""
    assert one.keys() == other.keys() and one
    error = sum((one[name] - other[name]).square().sum() for name in other)
    return float((error / sum(tensor.square().sum() for tensor in other.values())).sqrt())


REFUSED = {
    "rank": "its adapter is Adapter(alpha=6.0, rank=4, target_modules=None), not Adapter(alpha=6.0, rank=2, ",
    "targets": "not Adapter(alpha=6.0, rank=4, target_modules=['to_q'])",
    "no adapter": "target_modules=None), not none;",
    "optimizer": "its optimizer is SGD, not AdamW;",
    "tensors": "its number of tensors that train is ",
}
"""What is said of each of ``adapter_ranks.OTHERS``."""


@pytest.mark.slow
def test_two_ranks_train_adapters_as_one_process_does(tmp_path, root):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tests.adapter_ranks", str(tmp_path)]
    subprocess.run(command, env=environment, cwd=root, check=True)
    assert json.loads((tmp_path / "statuses.json").read_text()) == [[0], [0, 0], [0, 0], [0]]
    found = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    pairs = {"ddp": "alone", "fsdp2": "alone", "ddp-teacher": "alone-teacher", "fsdp2-teacher": "alone-teacher"}
    for two, one in pairs.items():
        for kind in ("gradient", "weights"):
            assert difference(found[two][kind], found[one][kind]) < 1e-6, (two, kind)
    resumed = [name for name in found if "-from-" in name]
    assert len(resumed) == 7
    for two in ("ddp", "fsdp2", "fsdp2-parts", *resumed):
        for kind in ("weights", "averages"):
            whole = "grouped" if two == "fsdp2-from-groups" else "alone"
            assert difference(found[two][kind], found[whole][kind]) < 1e-6, (two, kind)
    said = json.loads((tmp_path / "refused.json").read_text())
    assert len(said) == 15
    for case, sentence in said.items():
        assert sentence.startswith("ckpt_path: the checkpoint belongs to another configuration: its "), case
        assert REFUSED[case.partition(": ")[2]] in sentence, case
    for name in ("saved", "one"):
        saved = torch.load(tmp_path / name / "step=2.ckpt", weights_only=True)
        assert saved["state_dict"] and not any("base_layer" in each for each in saved["state_dict"])
    for two in ("ddp", "fsdp2"):
        files = {path.name for path in (tmp_path / two / "network").iterdir()}
        assert "pytorch_lora_weights.safetensors" in files and "diffusion_pytorch_model.safetensors" not in files
