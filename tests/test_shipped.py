from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from emf_lightning.cli import main
from emf_lightning.cli.parsing.experiment_files import config_files, expand
from emf_lightning.cli.shards import missing_shards
from emf_lightning.cli.shipped import SHIPPED, experiment_file, shipped_names, with_shipped_files
from tests.cli.world import complaint

NAMES = [file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.glob("*/*.yaml")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def last(arguments: list[str]) -> Path:
    return Path(arguments[-1])


@pytest.mark.parametrize("spelling", ["{}", "{}.yaml", "experiments/{}", "experiments/{}.yaml", "./{}"])
@pytest.mark.parametrize("option", ["--config {}", "-c {}", "--config={}"])
def test_a_shipped_experiment_is_found_by_name_from_any_folder(spelling: str, option: str) -> None:
    for name in ("shapes/demo", "scores/hps", "devices/ddp"):
        found = expand(["fit", *option.format(spelling.format(name)).split()])
        assert last(found) == SHIPPED / f"{name}.yaml"


@pytest.mark.parametrize("local", ["shapes/demo", "shapes/demo.yaml", "experiments/shapes/demo.yaml"])
def test_a_local_file_of_that_name_wins(local: str) -> None:
    Path(local).parent.mkdir(parents=True)
    Path(local).write_text("a: 1\n")

    assert last(expand(["fit", "--config", "shapes/demo"])) == Path(local)


def test_a_local_folder_of_that_name_is_no_experiment() -> None:
    Path("shapes/demo").mkdir(parents=True)

    assert experiment_file("shapes/demo") == SHIPPED / "shapes/demo.yaml"


@pytest.mark.parametrize("name", ["../experiments/shapes/demo", "/shapes/demo", "README", "shapes", "", "experiments"])
def test_what_is_no_name_of_an_experiment_finds_none(name: str) -> None:
    assert experiment_file(name) is None


def test_a_base_may_be_a_shipped_experiment_and_one_beside_the_file_wins() -> None:
    Path("mine").mkdir()
    Path("mine/new.yaml").write_text("base: [shapes/emf, experiments/devices/ddp.yaml]\n")
    shipped = config_files("mine/new.yaml")
    assert [SHIPPED / "shapes/emf.yaml", SHIPPED / "devices/ddp.yaml", Path("mine/new.yaml")] == shipped[-3:]

    Path("mine/shapes").mkdir()
    Path("mine/shapes/emf.yaml").write_text("a: 1\n")
    assert config_files("mine/new.yaml")[0] == Path("mine/shapes/emf.yaml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("shapes/dmo", "did you mean shapes/demo?"),
        ("demo.yaml", "did you mean shapes/demo?"),
        ("experiments/scores/hsp.yaml", "did you mean scores/hps?"),
        ("flow_matching", "did you mean claim/flow_matching or own_data/flow_matching or shapes/flow_matching?"),
        ("qqqqqqqq", "is shipped (`emf experiments` lists them)"),
    ],
)
def test_an_unknown_name_gets_the_nearest(capsys: pytest.CaptureFixture[str], name: str, meant: str) -> None:
    assert meant in complaint(capsys, "fit", "--config", name)
    assert meant in complaint(capsys, "compare", "--out", "out", "--experiments", f"[{name}]")
    assert meant in complaint(capsys, "claim", "--meanflow", name)
    Path("new.yaml").write_text(f"base: {name}\n")
    assert meant in complaint(capsys, "plan", "--config", "new.yaml")


def test_paths_below_experiments_become_the_packages_unless_they_are_here() -> None:
    parent = "experiments/shapes/parent"
    settings = Namespace(net=Namespace(pretrained=parent, others=[{"path": Path(parent)}, 3]), reference="a/b")

    found = with_shipped_files(settings)
    assert found.net.pretrained == str(SHIPPED / "shapes/parent")
    assert found.net.others == [{"path": SHIPPED / "shapes/parent"}, 3]
    assert (found.reference, settings.net.pretrained) == ("a/b", parent)

    Path(parent).mkdir(parents=True)
    assert with_shipped_files(settings) == settings


@pytest.mark.parametrize("path", ["experiments", "experiments/shapes", "experiments/../x", "experiments/none.txt", ""])
def test_a_folder_to_write_into_is_never_the_packages(path: str) -> None:
    assert with_shipped_files(path) == path


def test_every_shipped_experiment_is_listed_with_its_question_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    main(["experiments"])

    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= 100
    assert set(NAMES) == set(shipped_names())
    for name in NAMES:
        assert re.search(rf"(?m)^  .*\b{name}(,|$)", text), name
    assert re.search(r"  shapes/demo\n +Does the installation work,.*Cost: 5 minutes\.", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_experiment_is_made_of_copies_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["new", "mine", "--experiment", name])

    *files, command = capsys.readouterr().out.splitlines()
    written = {file.resolve() for file in Path("mine").rglob("*.yaml")}
    assert {Path(file).resolve() for file in files} == written
    assert {file.resolve() for file in config_files(f"mine/{name}.yaml")} == written
    assert command.startswith("emf ")
    assert f"--config mine/{name}.yaml" in command
    copied, shipped = config_files(f"mine/{name}.yaml"), config_files(SHIPPED / f"{name}.yaml")
    assert [file.read_text() for file in copied] == [file.read_text() for file in shipped]


def test_a_new_experiment_overwrites_nothing_and_is_a_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["new", "mine"])
    Path("mine/shapes/demo.yaml").write_text("changed: 1\n")
    assert "is there already" in complaint(capsys, "new", "mine", "--experiment", "shapes/emf")
    assert yaml.safe_load(Path("mine/shapes/demo.yaml").read_text()) == {"changed": 1}
    assert "did you mean shapes/emf?" in complaint(capsys, "new", "other", "--experiment", "emf")
    main(["new", "."])
    capsys.readouterr()
    main(["new", "with space"])  # the package's, whatever lies here
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == "with space/shapes/demo.yaml"
    Path("own.yaml").write_text("a: 1\n")
    assert "experiment: there is no own" in complaint(capsys, "new", "other", "--experiment", "own")


def test_missing_shards_of_a_shapes_world_come_with_the_commands_of_make(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, "fit", "--config", "shapes/demo", "--trainer.accelerator", "cpu")

    made = re.findall(r"\$\(BIN\)/(emf shards .*(?:50000|1000) .*)", (root / "Makefile").read_text())
    assert len(made) == 2
    assert line.endswith("; first run: " + " && ".join(made))
    without_captions = "cannot read 'data/shapes/small/captions.txt' (No such file or directory); give a text file"
    assert line.endswith(missing_shards(without_captions))


def test_a_shipped_experiment_finds_its_weights_and_scores_from_any_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from emf_lightning.cli.parsing.builder import BuildingCLI

    main(["plan", "--config", "shapes/emf"])
    assert "network" in capsys.readouterr().out

    built = BuildingCLI.run(expand(["fit", "--config", "shapes/emf"]))
    assert built.model.net.transformer.config.caption_channels == built.datamodule.context_width
    assert built.settings.model.init_args.net.init_args.pretrained == "experiments/shapes/parent"
    assert not Path("experiments").exists()
