from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from emf_lightning.data.shapes.prompts import evaluation_prompts
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict
from emf_lightning.evaluation.metric_scores import MetricScores
from emf_lightning.evaluation.reports.contact_sheet import contact_sheet
from emf_lightning.evaluation.reports.figures import step_colour, step_count_figure, training_curves

PROMPTS = evaluation_prompts(SMALL, per_task=5)


def scores(share: float) -> dict[str, MetricScores]:
    rng = np.random.default_rng(0)
    verdicts = TaskScores.of((prompt, Verdict(bool(rng.random() < share), False, "")) for prompt in PROMPTS * 3)
    return {"shapes": MetricScores.of_tasks(verdicts, "shapes")}


def distance(value: float) -> dict[str, MetricScores]:
    return {"kid": MetricScores("KID x 1000", "KID x 1000", {"score": value, "spread": 3.0}, False)}


LEVELS = {"ceiling": scores(1.0), "chance": scores(0.1)}


def rendered(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def colours_of(axes) -> list[str]:
    return [line.get_color() for line in axes.lines if len(line.get_xdata()) > 2]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_contact_sheet_has_a_row_a_prompt_and_a_column_a_sampling_config():
    images = np.random.default_rng(0).integers(0, 256, (3, 36, 36, 3), dtype=np.uint8)
    columns = {"1 step": images, "4 steps": images[::-1], "training image": images}
    figure = contact_sheet(["a photo of a circle", "b", "c"], columns, {"1 step": [True, False, True]}, "run, step 3")
    assert len(figure.axes) == 9
    shown = [axes.images[0] for axes in figure.axes]
    assert all(image.get_interpolation() == "nearest" for image in shown)
    assert np.array_equal(shown[1].get_array(), images[2])  # along the first row
    assert np.array_equal(shown[3].get_array(), images[1])  # then the second
    marks = [axes.texts[0].get_text() for axes in figure.axes if axes.texts]
    assert marks == ["✓", "✗", "✓"]
    words = [text.get_text() for text in figure.texts]
    assert words == ["run, step 3", "a circle", "1 step", "4 steps", "training\nimage", "b", "c"]
    assert rendered(figure).width > 400


def test_the_contact_sheet_of_many_or_long_prompts_keeps_its_shape():
    images = np.zeros((40, 8, 8, 3), np.uint8)
    prompts = ["costs $5 or $x_{", "ein Fuchs " * 60, "x" * 400, *["c"] * 37]
    figure = contact_sheet(prompts, {"1 step": images, "4 steps": images})
    assert not any(axes.texts for axes in figure.axes)
    picture = rendered(figure)
    assert 0.3 < picture.width / picture.height < 1
    blocks = {round(axes.get_position().x0, 4) for axes in figure.axes}
    assert len(blocks) == 4, "two blocks of two columns"
    assert all(text.get_text().count("\n") < 4 for text in figure.texts)


def test_the_step_count_figure_has_a_panel_a_task_and_a_line_a_series():
    series = {"MeanFlow": {1: scores(0.3), 2: scores(0.5), 4: scores(0.9)}, "parent": {4: scores(0.8), 30: scores(1)}}
    figure = step_count_figure(series, LEVELS)
    assert [axes.get_title() for axes in figure.axes] == [
        "overall",
        "single",
        "two",
        "counting",
        "colours",
        "position",
        "attribution",
    ]
    overall = figure.axes[0]
    first, second = (container.lines[0] for container in overall.containers)
    assert first.get_xdata().tolist() == [1, 2, 4]
    assert first.get_ydata() == pytest.approx([found["shapes"].score for found in series["MeanFlow"].values()])
    assert second.get_xdata().tolist() == [4, 30]
    assert [text.get_text() for text in overall.texts] == ["ceiling", "chance"]
    assert legend_of(figure) == ["MeanFlow", "parent"]
    assert rendered(figure).size == (1350, 600)


def test_the_training_curves_have_a_line_a_step_count_in_its_own_colour():
    curves = {n: [(k * 500, scores(0.1 * n * k)) for k in range(3)] for n in (1, 2, 4)}
    figure = training_curves(curves, LEVELS, {4: scores(0.5), 30: scores(0.7)}, remark="parent, guidance 2")
    assert len(figure.axes) == 7
    for axes in figure.axes:
        assert colours_of(axes) == [step_colour(1), step_colour(2), step_colour(4)]
    own = ["1 step", " ", "2 steps", " ", "4 steps", "parent, 4 steps"]
    assert legend_of(figure) == [*own, " ", "parent, 30 steps"]
    assert figure.legends[0].get_title().get_text() == "parent, guidance 2"
    keys = dict(zip(legend_of(figure), figure.legends[0].get_lines(), strict=True))
    assert keys["parent, 30 steps"].get_color() == step_colour(30), "a dashed line's key has its colour"
    picture = rendered(figure)
    box = figure.legends[0].get_window_extent()
    assert box.y1 < min(axes.get_window_extent().y0 for axes in figure.axes), "the legend covers a panel"
    assert 0 <= box.x0 and box.x1 <= picture.width


def test_a_metric_has_a_panel_of_its_own_with_its_unit_and_direction():
    curves = {n: [(k, scores(0.5) | distance(90.0 - 10 * k)) for k in range(3)] for n in (1, 2)}
    for figure in (
        training_curves(curves, LEVELS),
        step_count_figure({"this run": dict(enumerate([curves[1][0][1]], 1))}),
    ):
        last = figure.axes[-1]
        assert last.get_title() == "KID x 1000\nlower is better"
        assert last.get_ylabel() == "KID x 1000"
        assert last.get_ylim()[1] > 2, "a distance is no share"
        rendered(figure)


def test_curves_of_one_number_are_one_panel():
    figure = training_curves({1: [(k, distance(k)) for k in range(3)]})
    assert [axes.get_title() for axes in figure.axes] == ["KID x 1000\nlower is better"]
    assert rendered(figure).width < 700


def test_figures_leave_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    step_count_figure({"MeanFlow": {1: scores(0.3)}})
    assert dict(matplotlib.rcParams) == before
