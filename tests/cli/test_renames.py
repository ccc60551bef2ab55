"""Old names of classes and arguments are refused in one sentence that gives the new name."""

from __future__ import annotations

import inspect
import sys

import pytest

from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.parsing.emf_cli import CLASS_PACKAGES
from emf_lightning.renames import ARGUMENTS, CLASSES
from tests.cli.world import complaint

SHIPPED_ARGUMENTS, SHIPPED_CLASSES = dict(ARGUMENTS), dict(CLASSES)

OLD_ARGUMENTS = {
    ("FlowMapModule", "first"): "init_from",
    ("FlowMapModule", "second"): "objective.init_args.times",
    ("FlowMapModule", "third"): "leave it out, the strategy decides",
    ("SanaFlowMap", "first"): "time_scale",
    ("SanaArchitecture", "first"): "num_layers",
    ("TimeSampler", "first"): "ratio; its value is 1 - first",
    ("Schedule", "first"): "start",
    ("SampleWriter", "first"): "steps",
    ("PromptSuite", "first"): "world",
    ("CaptionImageData", "first"): "shards",
}
OLD_CLASSES = {
    "OldModel": "FlowMapModule",
    "emf_lightning.old.Words": "WordEncoder",
    "Pixels": "an autoencoder, in data",
}


@pytest.fixture(autouse=True)
def old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, new in OLD_ARGUMENTS.items():
        monkeypatch.setitem(ARGUMENTS, name, new)
    for kind, new in OLD_CLASSES.items():
        monkeypatch.setitem(CLASSES, kind, new)


NET, TIMES = "model.init_args.net.init_args", "model.init_args.objective.init_args.times.init_args"
SAMPLER = (
    "{model: {init_args: {objective: {class_path: FlowMatching, init_args: "
    "{times: {class_path: LogitNormalTimes, init_args: %s}}}}}}"
)
SUITE = """
trainer:
  callbacks:
    - class_path: FewStepSampling
      init_args: {suite: {class_path: ShapesSuite, init_args: {first: 1}}}
"""
SUITE_ARGUMENTS = "trainer.callbacks.init_args.suite.init_args"


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("{model: {init_args: {first: 1}}}", "model.init_args.first is now model.init_args.init_from"),
        (
            "{model: {init_args: {second: 1}}}",
            "model.init_args.second is now model.init_args.objective.init_args.times",
        ),
        ("{model: {init_args: {third: 1}}}", "model.init_args.third: leave it out, the strategy decides"),
        ("{model: {init_args: {net: {init_args: {first: 1}}}}}", f"{NET}.first is now {NET}.time_scale"),
        (
            "{model: {init_args: {net: {init_args: {architecture: {first: 1}}}}}}",
            f"{NET}.architecture.first is now {NET}.architecture.num_layers",
        ),
        (SAMPLER % "{first: {start: 0}}", f"{TIMES}.first is now {TIMES}.ratio; its value is 1 - first"),
        (SAMPLER % "{mu: {first: 0}}", f"{TIMES}.mu.first is now {TIMES}.mu.start"),
        (
            "{trainer: {callbacks+: [{class_path: SampleWriter, init_args: {first: 1}}]}}",
            "trainer.callbacks.init_args.first is now trainer.callbacks.init_args.steps",
        ),
        (SUITE, f"{SUITE_ARGUMENTS}.first is now {SUITE_ARGUMENTS}.world"),
        ("{data: {first: 1}}", "data.first is now data.shards"),
        ("{model: {class_path: OldModel}}", "model: OldModel is now FlowMapModule"),
        ("{model: {class_path: Pixels}}", "model: Pixels is now an autoencoder, in data"),
        ("{data: {text: emf_lightning.old.Words}}", "data.text: emf_lightning.old.Words is now WordEncoder"),
        (
            "{trainer: {callbacks: [{class_path: emf_lightning.old.SampleWriter}]}}",
            "trainer.callbacks: emf_lightning.old.SampleWriter is now SampleWriter",
        ),
    ],
)
def test_an_old_name_in_yaml_is_answered_by_the_new_one(
    capsys: pytest.CaptureFixture[str], yaml: str, said: str
) -> None:
    assert complaint(capsys, "fit", "--config", "shapes/child.yaml", "--config", yaml) == f"emf fit: {said}"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.init_args.first", "model.init_args.first is now model.init_args.init_from"),
        ("--model.first", "model.init_args.first is now model.init_args.init_from"),
        ("--model.net.first", f"{NET}.first is now {NET}.time_scale"),
        ("--trainer.callbacks.first", "trainer.callbacks.init_args.first is now trainer.callbacks.init_args.steps"),
        ("--data.first", "data.first is now data.shards"),
    ],
)
def test_an_old_option_is_answered_by_the_new_one(capsys: pytest.CaptureFixture[str], option: str, said: str) -> None:
    assert complaint(capsys, "fit", "--config", "shapes/child.yaml", option, "1") == f"emf fit: {said}"


def test_an_old_class_on_the_command_line_is_answered_by_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "fit", "--config", "shapes/child.yaml", "--model", "OldModel")

    assert said == "emf fit: model: OldModel is now FlowMapModule"


def test_the_table_names_classes_and_arguments_that_exist() -> None:
    import_classes("data", *CLASS_PACKAGES)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("emf_lightning.")]
    kinds = {name: value for m in modules for name, value in vars(m).items() if inspect.isclass(value)}

    assert {new.partition(",")[0] for new in SHIPPED_CLASSES.values()} <= kinds.keys()
    for (kind, old), new in SHIPPED_ARGUMENTS.items():
        argument = new.partition(";")[0].partition(".")[0]
        subclasses = [value for value in kinds.values() if kinds[kind] in value.__mro__]
        arguments = [inspect.signature(value).parameters for value in subclasses]
        assert any(argument in known and old not in known for known in arguments), (kind, old, new)
