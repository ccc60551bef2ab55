"""`emf plan` of the shipped experiments: each ends in a figure, before any of its parents has been trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emf_lightning.cli import main
from emf_lightning.cli.shipped import SHIPPED, shipped_names

VERBS = ("scores", "encoders")
OVERLAYS = ("parts", "devices")
EXPERIMENTS = [name for name in shipped_names() if not name.startswith((*VERBS, *OVERLAYS))]

ASSUMING = {
    "fgm/cifar10": "runs/fgm/cifar10_teacher/version_0/network is not here; planned with that of "
    "experiments/fgm/cifar10_teacher.yaml",
    "emf/sana_tuned": "runs/emf/sana_encoder/version_0/encoder is not here; planned with that of "
    "experiments/emf/sana_encoder.yaml",
    "own_data/meanflow": "planned with that of experiments/own_data/flow_matching.yaml",
    "emf/openuni": "planned with that of experiments/emf/openuni_flow_matching.yaml",
    "shapes/anyflow_on_policy": "",
    "shapes/refined": "",
    "shapes/refined_matched": "",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def hours(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[float, str]:
    """GPU hours, and all that is printed."""
    capsys.readouterr()
    main(["plan", *arguments])
    out = capsys.readouterr().out
    found = re.search(r"in all +[\d.e+-]+ (?:h|days) +([\d.,]+) GPU hours", out)
    assert found, out
    return float(found[1].replace(",", "")), out


@pytest.mark.parametrize("name", ASSUMING)
def test_an_experiment_is_planned_before_its_parent_is_trained(capsys, name):
    assert ASSUMING[name] in hours(capsys, name)[1]


def test_patches_are_tokens_and_fp32_takes_longer_than_planned(capsys):
    assert ", 4,096 a row" in hours(capsys, "fgm/sd3")[1]
    said = hours(capsys, "scflow/celebahq")[1]
    assert "trainer.precision 32-true: the time is that of 16-bit arithmetic; fp32 takes twice as long for" in said


def test_lumina_is_planned(capsys):
    text = ["--data.text", "Lumina2TextEncoder"]
    net = ["--model.init_args.net", "Lumina2FlowMap", "--model.init_args.net.init_args.interval", "AnchoredInterval"]
    weights = ["--model.init_args.net.init_args.pretrained.path", "Alpha-VLLM/Lumina-Image-2.0"]
    count, out = hours(capsys, "meanflow/flux_lite", *text, *net, *weights)
    assert count > 10
    assert "2,614,341,888" in out


@pytest.mark.parametrize("name", ["someone/has-it", "/no/such/folder"])
def test_a_network_that_is_not_here_has_its_default_size(capsys, name):
    _, out = hours(capsys, "fgm/cifar10_teacher", "--model.init_args.net.init_args.pretrained", name)
    assert f"{name} is not here; planned with the default size of UNetFlowMap: name another with --model.init" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_ends_in_a_figure(capsys, name):
    hours(capsys, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith(OVERLAYS)])
def test_every_overlay_ends_in_a_figure(capsys, name):
    base = "emf/sana" if "full_size" in name or "devices" in name else "shapes/emf"
    hours(capsys, base, "--config", str(SHIPPED / f"{name}.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith(VERBS)])
def test_a_file_of_another_verb_is_one_sentence(capsys, name):
    with pytest.raises(SystemExit):
        main(["plan", name])
    assert capsys.readouterr().err.startswith("emf plan: ")
