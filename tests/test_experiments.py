from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from emf_lightning.cli.parsing.experiment_files import config_files, expand, without_base


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """grandparent.yaml <- sub/parent.yaml <- sub/child.yaml, and sub/sibling.yaml beside the child."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "grandparent.yaml").write_text("a: 1\n")
    (tmp_path / "sub/parent.yaml").write_text("base: ../grandparent.yaml\na: 2\n")
    (tmp_path / "sub/child.yaml").write_text("base: parent.yaml\na: 3\n")
    (tmp_path / "sub/sibling.yaml").write_text("base: [parent.yaml]\na: 4\n")
    return tmp_path


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_lineage_is_oldest_first(folder: Path) -> None:
    assert names(config_files("sub/child.yaml")) == ["grandparent.yaml", "parent.yaml", "child.yaml"]


def test_a_file_without_base_is_its_whole_lineage(folder: Path) -> None:
    assert names(config_files("grandparent.yaml")) == ["grandparent.yaml"]


def test_several_bases_apply_in_their_order_and_a_shared_one_once(folder: Path) -> None:
    (folder / "two.yaml").write_text("base:\n- sub/sibling.yaml  # first\n- sub/child.yaml\na: 5\n")

    assert names(config_files("two.yaml")) == [
        "grandparent.yaml",
        "parent.yaml",
        "sibling.yaml",
        "child.yaml",
        "two.yaml",
    ]


def test_a_base_that_is_not_there_names_the_file_that_asks_for_it(folder: Path) -> None:
    (folder / "sub/orphan.yaml").write_text("base: gone.yaml\n")

    with pytest.raises(ValueError, match=r"sub/orphan\.yaml: base 'gone\.yaml' is not there: no file sub/gone\.yaml"):
        config_files("sub/orphan.yaml")


def test_a_circle_is_named_link_by_link(folder: Path) -> None:
    (folder / "one.yaml").write_text("base: sub/other.yaml\n")
    (folder / "sub/other.yaml").write_text("base: ../one.yaml\n")

    with pytest.raises(ValueError, match=r"circle, one\.yaml -> sub/other\.yaml -> sub/\.\./one\.yaml"):
        config_files("one.yaml")


@pytest.mark.parametrize("value", ["3", "{a: b}", "[1]"])
def test_a_base_that_is_no_name_is_an_error(folder: Path, value: str) -> None:
    (folder / "odd.yaml").write_text(f"base: {value}\n")

    with pytest.raises(ValueError, match=r"odd\.yaml: `base:` must be a file name or a list"):
        config_files("odd.yaml")


def test_broken_yaml_names_file_and_line(folder: Path) -> None:
    (folder / "broken.yaml").write_text("a: 1\nb: [1, 2\n")

    with pytest.raises(ValueError, match=r"broken\.yaml: no valid YAML: .*line 3"):
        config_files("broken.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "odd.yaml holds no settings"),
        (b"# nothing\n", "odd.yaml holds no settings"),
        (b"- a\n- b\n", "odd.yaml holds no settings"),
        (b"PK\x03\x89", "odd.yaml is no YAML: it is not UTF-8 text"),
    ],
)
def test_a_file_of_something_else_is_an_error(folder: Path, content: bytes, said: str) -> None:
    (folder / "odd.yaml").write_bytes(content)

    with pytest.raises(ValueError, match=said):
        config_files("odd.yaml")


@pytest.mark.parametrize(
    "option", [["--config", "sub/child.yaml"], ["-c", "sub/child.yaml"], ["--config=sub/child.yaml"]]
)
def test_each_file_of_a_lineage_becomes_one_option(folder: Path, option: list[str]) -> None:
    expanded = expand(["fit", *option, "--a", "7"])

    name = option[0].partition("=")[0]
    files = ["sub/../grandparent.yaml", "sub/parent.yaml", "sub/child.yaml"]
    assert expanded == ["fit", *(part for file in files for part in (name, file)), "--a", "7"]


def test_a_second_experiment_does_not_apply_a_shared_base_again(folder: Path) -> None:
    expanded = expand(["--config", "sub/child.yaml", "--config", "sub/sibling.yaml"])

    assert [Path(file).name for file in expanded[1::2]] == [
        "grandparent.yaml",
        "parent.yaml",
        "child.yaml",
        "sibling.yaml",
    ]


def test_yaml_text_is_left_alone() -> None:
    assert expand(["fit", "--config", "{a: 1}"]) == ["fit", "--config", "{a: 1}"]


def test_a_missing_experiment_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--config sub/none\.yaml: no such file"):
        expand(["fit", "--config", "sub/none.yaml"])


@pytest.mark.parametrize(
    "text",
    [
        "base: x.yaml\na: 1\nb: 2\n",
        "a: 1\nbase: x.yaml  # why\nb: 2\n",
        "a: 1\nbase: [x.yaml,\n  y.yaml]\nb: 2\n",
        "a: 1\nbase:\n  - x.yaml\n\n  - y.yaml\nb: 2\n",
        "a: 1\nb: 2\nbase: x.yaml\n",
    ],
)
def test_the_parser_sees_everything_but_base_on_the_lines_where_it_was(text: str) -> None:
    rest = without_base(text)

    assert yaml.safe_load(rest) == {"a": 1, "b": 2}
    assert rest.split("\n").index("b: 2") == text.split("\n").index("b: 2")


@pytest.mark.parametrize(
    "text",
    [
        "{base: x.yaml, a: 1, b: 2}",
        "{a: 1, base: [x.yaml, y.yaml], b: 2}\n",
        "{a: 1, b: 2, base: x.yaml}",
        '{"base": "x.yaml", "a": 1, "b": 2}',
        "base: &name 1\na: *name\nb: 2\n",
        "---\nbase: x.yaml\na: 1\nb: 2\n...\n",
        "a: &name 1\nbase: *name\nb: 2\n",
        "? base\n: x.yaml\n? a\n: 1\n? b\n: 2\n",
    ],
)
def test_the_parser_sees_everything_but_base_in_any_style(text: str) -> None:
    assert yaml.safe_load(without_base(text)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("text", ["base: x.yaml\n", "---\nbase: x.yaml\n...\n", "{base: x.yaml}"])
def test_a_file_of_nothing_but_base_is_an_empty_mapping(text: str) -> None:
    assert yaml.safe_load(without_base(text)) == {}


def test_a_nested_base_is_an_ordinary_key() -> None:
    assert without_base("model:\n  base: 3\n") == "model:\n  base: 3\n"


# -- the files that are shipped ---------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/devices/*.yaml"))
STUDIES = sorted(
    str(path.relative_to(ROOT)) for kind in ("encoders", "scores") for path in ROOT.glob(f"experiments/{kind}/*.yaml")
)
PARTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/parts/*.yaml"))
SHIPPED = sorted(
    {str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/*/*.yaml")} - {*OVERLAYS, *STUDIES, *PARTS}
)
BUILT = [path for path in SHIPPED if path.split("/")[1] not in ("fgm", "meanflow", "scflow")]
"""Without those that test_published_experiments.py covers."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints in the layouts that the experiments at full size start from."""
    from tests import tiny_checkpoints

    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoints.blip3o_next(folder)
    tiny_checkpoints.sana(folder / "sana")
    tiny_checkpoints.language_model(folder / "gemma", "Gemma2")
    tiny_checkpoints.language_model(folder / "qwen", "Qwen2")
    return folder


def flow_from(experiment: str, folder: Path) -> None:
    """Saves an untrained network of an experiment's architecture, as the experiment's end would."""
    from emf_lightning.networks import prediction
    from emf_lightning.networks.flux import FluxArchitecture, FluxFlowMap
    from emf_lightning.networks.unet import TextUNetFlowMap, UNetArchitecture

    kinds = {"FluxFlowMap": (FluxFlowMap, FluxArchitecture), "TextUNetFlowMap": (TextUNetFlowMap, UNetArchitecture)}
    settings = yaml.safe_load((ROOT / experiment).read_text())
    net, patch = settings["model"]["init_args"]["net"], settings["data"]["autoencoder"]["init_args"]["patch_size"]
    kind, size = kinds[net["class_path"]]
    predicted = getattr(prediction, net["init_args"]["prediction"]["class_path"])()
    shape = {"latent_channels": 3 * patch**2, "latent_size": 36 // patch, "context_width": 128}
    architecture = size(**net["init_args"]["architecture"])
    kind(architecture, time_scale=5.0, prediction=predicted, **shape).save_pretrained(folder)


def latent_parts(experiment: str, folder: Path) -> list[str]:
    """Options with an untrained autoencoder and, for a second stage, an untrained network in its latents."""
    from benchmarks.small_latent import small_autoencoder
    from emf_lightning.networks.prediction import PredictData
    from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap

    small_autoencoder().save_pretrained(str(folder / "autoencoder"))
    options = ["--data.autoencoder.init_args.pretrained", str(folder / "autoencoder")]
    if experiment.endswith("flow_matching.yaml"):
        return options
    shape = {"latent_channels": 8, "latent_size": 9, "context_width": 128}
    settings = {"time_scale": 5.0, "prediction": PredictData(), **shape}
    SanaFlowMap(SanaArchitecture(patch_size=3), **settings).save_pretrained(folder / "latent_flow")
    return [*options, "--model.init_args.net.init_args.pretrained", str(folder / "latent_flow")]


def tiny(experiment: str, models: Path) -> list[str]:
    """Options that replace the models of a full-size experiment by tiny ones, or networks that are not trained yet."""
    if experiment == "experiments/own_data/meanflow.yaml":
        return ["--model.init_args.net.init_args.pretrained", "experiments/shapes/parent", "--data.resolution", "36"]
    if experiment in ("experiments/shapes/unet.yaml", "experiments/shapes/flux.yaml"):
        flow_from(experiment.replace(".yaml", "_flow_matching.yaml"), models / "flow")
        return ["--model.init_args.net.init_args.pretrained", str(models / "flow")]
    if experiment.startswith("experiments/shapes/latent_"):
        return latent_parts(experiment, models)
    if experiment in ("experiments/shapes/anyflow_on_policy.yaml", "experiments/shapes/refined_matched.yaml"):
        return ["--model.init_args.init_from", "null"]
    if not experiment.startswith("experiments/emf/"):
        return []
    net, text, autoencoder = "--model.init_args.net.init_args", "--data.text.init_args", "--data.autoencoder.init_args"
    options = {"--data.resolution": 16, f"{autoencoder}.pretrained": models / "diffusers"}
    if "blip3o" in experiment:
        options |= {f"{text}.pretrained": models / "blip3o", f"{net}.pretrained": models / "blip3o"}
        options |= {f"{text}.image_size": 14, f"{text}.image_heads": 2}
    else:
        encoder = "qwen" if "openuni" in experiment else "gemma"
        options |= {f"{text}.model": models / encoder, f"{net}.pretrained": models / "sana/transformer"}
    return [part for option, value in options.items() for part in (option, str(value))]


@pytest.mark.parametrize("experiment", BUILT)
def test_a_shipped_experiment_parses_and_builds_its_objects(
    experiment: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emf_lightning.cli.parsing.emf_cli import EMFCLI

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(EMFCLI, "_run_subcommand", lambda cli, verb: None)
    # independent of the machine that runs the tests
    options = ["--trainer.accelerator", "cpu", "--trainer.precision", "32", *tiny(experiment, models)]
    cli = EMFCLI.run(expand(["fit", "--config", experiment, *options]))

    assert cli.trainer.max_steps > 0
    assert cli.trainer.logger is not None
    name = experiment.removeprefix("experiments/").removesuffix(".yaml")
    assert Path(cli.trainer.default_root_dir) == Path("runs") / name
    assert cli.model.optimization.scheduler is not None
    net = cli.model.net
    assert net.diffusers_model.config[net.context_width_key] == cli.datamodule.context_width


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_goes_on_top_of_an_experiment(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from emf_lightning.cli.parsing.emf_cli import EMFCLI

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(EMFCLI, "_run_subcommand", lambda cli, verb: None)
    files = [part for file in ("experiments/shapes/emf.yaml", overlay) for part in ("--config", file)]
    options = ["--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.devices", "3"]
    cli = EMFCLI.run(expand(["fit", *files, *options]))

    assert cli.trainer.num_devices == 3
    if "fsdp2" in overlay:
        assert cli.trainer.strategy._data_parallel_size == 3
    assert "WeightEMA" in [type(callback).__name__ for callback in cli.trainer.callbacks]


@pytest.mark.parametrize("experiment", [*SHIPPED, *OVERLAYS, *STUDIES, *PARTS])
def test_a_shipped_experiment_is_in_the_table(experiment: str) -> None:
    table = (ROOT / "experiments/README.md").read_text()

    assert f"`{experiment.removeprefix('experiments/')}`" in table


@pytest.mark.parametrize("experiment", ["emf", "fgm", "scflow"])
def test_the_short_comparison_goes_on_top_of_an_adaptation(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from emf_lightning.cli.parsing.emf_cli import EMFCLI

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(EMFCLI, "_run_subcommand", lambda cli, verb: None)
    files = (f"experiments/shapes/{experiment}.yaml", "experiments/parts/short_comparison.yaml")
    options = ["--trainer.accelerator", "cpu", "--trainer.precision", "32"]
    cli = EMFCLI.run(expand(["fit", *(part for file in files for part in ("--config", file)), *options]))

    assert cli.datamodule.batch_size == 64
    sampling = next(part for part in cli.trainer.callbacks if type(part).__name__ == "FewStepSampling")
    assert [config.steps for config in sampling.configs] == [1, 2, 4, 30]


def test_diversity_goes_on_top_of_an_adaptation(monkeypatch: pytest.MonkeyPatch) -> None:
    from emf_lightning.cli.parsing.emf_cli import EMFCLI

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(EMFCLI, "_run_subcommand", lambda cli, verb: None)
    files = ("experiments/shapes/emf.yaml", "experiments/parts/diversity_in_training.yaml")
    options = ["--trainer.accelerator", "cpu", "--trainer.precision", "32"]
    cli = EMFCLI.run(expand(["fit", *(part for file in files for part in ("--config", file)), *options]))

    *_, sampling = (part for part in cli.trainer.callbacks if type(part).__name__ == "FewStepSampling")
    assert [benchmark.name for benchmark in sampling.benchmarks] == ["prompts"]
    assert [type(metric).__name__ for metric in sampling.extra_metrics] == ["PromptDiversity", "VendiScore"]
    assert sampling.every_n_steps == cli.trainer.val_check_interval


def test_geneval_goes_on_top_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed only, because its detector would be downloaded."""
    from emf_lightning.cli.assumptions import PlanningCLI

    monkeypatch.chdir(ROOT)
    files = ("experiments/emf/blip3o_next.yaml", "experiments/parts/geneval_in_training.yaml")
    settings = PlanningCLI.run(expand(["fit", *(part for file in files for part in ("--config", file))])).settings
    suite = settings.trainer.callbacks[-1].init_args.suite
    assert suite.class_path.endswith("GenEvalSuite")
    assert suite.init_args.detector.class_path.endswith("Mask2FormerDetector")
