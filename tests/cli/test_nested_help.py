"""Help for parts of parts."""

from __future__ import annotations

import pytest

from emf_lightning.cli import main
from tests.cli.world import complaint


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The text of `emf fit` with a help option."""
    with pytest.raises(SystemExit) as end:
        main(["fit", *options])
    assert end.value.code in (0, None)
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "shapes/child.yaml", "--model.net.architecture.help"],
        ["--config", "shapes/child.yaml", "--model.init_args.net.init_args.architecture.help"],
        ["--model.help=FlowMapModule", "--model.net.help=SanaFlowMap", "--model.net.architecture.help"],
        ["--model.net.help", "SanaFlowMap", "--model.net.architecture.help"],
    ],
)
def test_a_part_of_a_part_has_help(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert "--model.net.architecture.num_layers NUM_LAYERS" in shown(capsys, *options)


def test_without_a_class_the_help_is_of_the_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.net.time_scale" in shown(capsys, "--config", "shapes/child.yaml", "--model.net.help")
    assert "--data.text.width" in shown(capsys, "--config", "shapes/child.yaml", "--data.text.help")


def test_a_named_class_wins_over_the_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, "--config", "shapes/child.yaml", "--model.net.help=UNetFlowMap")

    assert "UNetFlowMap" in said


def test_a_part_of_an_unknown_class_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "fit", "--trainer.callbacks.suite.help", "ShapesSuite")

    assert said.endswith("name an experiment, --config FILE, or the class before it, --trainer.callbacks.help=CLASS")


def test_help_says_how_to_reach_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config FILE --model.net.architecture.help" in shown(capsys, "--help")
