"""`emf diagnose` on tiny runs, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emf_lightning import load_run
from emf_lightning.cli import main
from emf_lightning.cli.diagnose import images_of
from emf_lightning.cli.played_run import run_model
from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.evaluation.shapes.diagnosis.failures import CORRECT, KINDS
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from tests.cli.world import BASE, complaint

RUN, PARENT_RUN = "runs/student/version_0", "runs/tiny/version_0"
STUDENT = """
base: parent.yaml
trainer:
  logger: {init_args: {name: student}}
  callbacks+:
    - {class_path: WeightEMA, init_args: {decay: 0.5}}
model:
  init_args:
    init_from: runs/tiny/version_0/checkpoints/last.ckpt
    objective:
      class_path: MeanFlow
      init_args: {velocity: TeacherVelocity}
"""
JOINT = """
base: parent.yaml
trainer: {max_steps: 1, logger: {init_args: {name: joint}}}
model:
  class_path: JointDistillation
  init_args:
    objective: JointObjective
    init_from: runs/student/version_0/checkpoints/last.ckpt
    net: {init_args: {pretrained: runs/tiny/version_0/network, architecture: null}}
"""
WIDE = """
base: student.yaml
trainer: {logger: {init_args: {name: wide}}}
model: {init_args: {init_from: null, net: {init_args: {architecture: {num_layers: 2}}}}}
"""
LITTLE = """
trainer: {logger: {init_args: {name: little}}}
data: {resolution: 24}
"""
OPTIONS = ["--images", "12", "--steps", "[1, 2]", "--parent_steps", "2", "--boundary_images", "3", "--directions", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow-matching run, and MeanFlow from it, diagnosed."""
    path = tmp_path_factory.mktemp("diagnosed")
    files = {"student": STUDENT, "joint": JOINT, "wide": WIDE, "little": LITTLE}
    files["parent"] = BASE.replace("init_args: {save_last: true}", "init_args: {save_last: true}\n    - SaveNetwork")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, text in files.items():
            Path(f"{name}.yaml").write_text(text)
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        main(["fit", "--config", "parent.yaml", "--model.init_args.guidance_scale", "2"])
        main(["fit", "--config", "student.yaml"])
        main(["diagnose", RUN, *OPTIONS])
    return path


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


@pytest.fixture(scope="module")
def further(world: Path) -> None:
    """The joint training from both, a deeper run, one of another size, and an export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        main(["fit", "--config", "joint.yaml"])
        main(["fit", "--config", "wide.yaml"])
        main(["fit", "--config", "student.yaml", "--config", "little.yaml"])
        main(["export", "--run", RUN, "--out", "exported"])


def numbers(folder: str = f"{RUN}/diagnosis") -> dict:
    return json.loads(Path(folder, "diagnosis.json").read_text())


def kept(folder: str = f"{RUN}/diagnosis") -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted(Path(folder, "images").glob("*.npy"))}


def holds(images: list[np.ndarray], wanted: list[Image.Image]) -> bool:
    return any(len(one) == len(wanted) and np.array_equal(one, np.stack(wanted)) for one in images)


def test_the_page_has_every_model_step_count_and_group() -> None:
    found = numbers()
    titles = list(found["shares"])
    assert titles[0].endswith(", 1 step") and titles[4:] == ["parent, 2 steps", "real pictures"]
    assert titles[2:4] == [title.replace(",", ", live,", 1) for title in titles[:2]]
    for groups in found["shares"].values():
        assert {"all", "single", "two", "counting", "colours", "position", "attribution"} <= set(groups)
        for shares in groups.values():
            assert set(shares) == {CORRECT, *KINDS}
            assert sum(share["value"] for share in shares.values()) == pytest.approx(1)
        assert groups["all"][CORRECT]["images"] == 12
    assert found["shares"]["real pictures"]["all"][CORRECT]["value"] == 1
    assert found["variance"]["parent, 2 steps"]["within a prompt"]["value"] == 1
    assert list(found["agreement"]) == [*titles[:4], "parent, 2 steps, other noise"]
    assert sum(of["parent fails"]["images"] for of in found["boundary"]["bins"].values()) == 3
    page = Path(RUN, "diagnosis/diagnosis.md").read_text()
    assert all(title in page for title in titles) and "nan" not in page.lower()
    with Image.open(Path(RUN, "diagnosis/diagnosis.png")) as figure:
        assert min(figure.size) > 300


def test_the_images_are_those_of_the_run_of_its_live_weights_and_of_its_parent() -> None:
    images, asked = list(kept().values()), images_of(ShapesSuite(), 12)
    texts = [one.prompt.prompt for one in asked][::2]
    assert [one.index for one in asked] == [0, 1] * 6 and [one.prompt.tag for one in asked][::2] == list(TASKS)
    model = load_run(RUN)
    for steps in (1, 2):
        assert holds(images, model.sample(texts, steps=steps, images_per_prompt=2))
    saved = torch.load(f"{RUN}/checkpoints/last.ckpt", weights_only=True)
    averages, live = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(averages[name], value) for name, value in live.items())
    model.load_state_dict(live)
    assert holds(images, model.sample(texts, steps=1, images_per_prompt=2))
    assert holds(images, load_run(PARENT_RUN).sample(texts, steps=2, images_per_prompt=2))


def test_a_repeated_call_keeps_its_images_and_makes_those_that_are_gone(capsys) -> None:
    page, before = Path(RUN, "diagnosis/diagnosis.md").read_text(), kept()
    times = {path: path.stat().st_mtime_ns for path in Path(RUN, "diagnosis/images").iterdir()}
    gone = sorted(times)[0]
    gone.unlink()
    main(["diagnose", RUN, *OPTIONS])
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != gone)
    after = kept()
    assert after.keys() == before.keys() and all(np.array_equal(after[name], before[name]) for name in before)
    assert Path(RUN, "diagnosis/diagnosis.md").read_text() == page
    assert page in capsys.readouterr().out


@pytest.mark.slow
def test_another_seed_makes_other_images(tmp_path) -> None:
    short = [*OPTIONS[:-4], "--boundary_images", "0", "--out", str(tmp_path)]
    main(["diagnose", RUN, *short, "--seed", "1"])
    assert not kept().keys() & kept(str(tmp_path)).keys()
    assert numbers(str(tmp_path))["boundary"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("further")
def test_a_second_run_stands_beside_the_first(tmp_path) -> None:
    main(["diagnose", "--run", RUN, "--against", "runs/wide", *OPTIONS, "--out", str(tmp_path)])
    found, before = numbers(str(tmp_path)), numbers()
    for part in ("shares", "agreement", "variance"):
        assert {title: of for title, of in found[part].items() if title in before[part]} == before[part]
    others = [title for title in found["shares"] if title not in before["shares"]]
    assert len(others) == 4 and all("wide" in title for title in others)


@pytest.mark.slow
@pytest.mark.usefixtures("further")
def test_the_parent_of_a_joint_training_is_its_teacher_and_not_the_checkpoint_it_started_from() -> None:
    model = run_model(Path("runs/joint"))
    parent, student = load_run(PARENT_RUN).net.state_dict(), load_run(RUN).net.state_dict()
    found = model.parent.transformer.part.state_dict()
    assert all(torch.equal(found[name], value) for name, value in parent.items())
    assert not all(torch.equal(found[name], value) for name, value in student.items())
    assert model.parent.config.guidance_scale == 2
    assert f"{PARENT_RUN}/network" in model.remark


@pytest.mark.slow
@pytest.mark.usefixtures("further")
def test_an_exported_folder_wants_a_parent_and_leaves_its_folder_alone(capsys) -> None:
    files = sorted(Path("exported").rglob("*"))
    line = complaint(capsys, "diagnose", "exported", *OPTIONS)
    assert "parent: An exported folder holds no parent" in line and "--parent" in line
    main(["diagnose", "exported", "--parent", PARENT_RUN, *OPTIONS])
    assert sorted(Path("exported").rglob("*")) == files
    found, own = numbers("exported-diagnosis"), numbers()
    assert len(found["shares"]) == 4  # an export has no live weights
    title = next(iter(own["shares"]))
    assert next(iter(found["shares"].values())) == own["shares"][title]


def test_a_run_from_scratch_wants_a_parent(capsys) -> None:
    assert "parent: The run started from no other model" in complaint(capsys, "diagnose", PARENT_RUN, *OPTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "11"], "images must be at least 12, got 11"),
        (["--steps", "[1, 1]"], "steps must be different whole numbers"),
        (["--near", "0"], "near must be above 0"),
        (["--directions", "0"], "directions must be at least 1"),
        (["--boundary_images", "-1"], "boundary_images must be at least 0"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(capsys, options, said) -> None:
    assert said in complaint(capsys, "diagnose", "not/there", *options)


def test_a_run_that_is_not_there_is_named(capsys) -> None:
    assert "run: not/there is not there" in complaint(capsys, "diagnose", "not/there")
    assert "run: gone is not there" in complaint(capsys, "diagnose", RUN, "--against", "gone")


@pytest.mark.slow
@pytest.mark.usefixtures("further")
def test_images_of_another_size_than_any_world_are_refused(capsys) -> None:
    line = complaint(capsys, "diagnose", "runs/little", *OPTIONS)
    assert "24 pixels" in line and "36 (small)" in line


@pytest.mark.slow
@pytest.mark.usefixtures("further")
def test_a_run_of_another_size_shares_no_noise(capsys) -> None:
    line = complaint(capsys, "diagnose", RUN, "--against", "runs/little", *OPTIONS)
    assert "the two share no noise" in line
