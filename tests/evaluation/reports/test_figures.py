from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from emf_lightning.data.geneval_prompts import TASKS
from emf_lightning.data.shapes.prompts import evaluation_prompts
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from emf_lightning.evaluation.geneval.verdict import Verdict
from emf_lightning.evaluation.reports.figures import contact_sheet, step_colour, step_count_figure, training_curves

PROMPTS = evaluation_prompts(SMALL, per_task=5)


def scores(share: float) -> TaskScores:
    rng = np.random.default_rng(0)
    return TaskScores.of((prompt, Verdict(bool(rng.random() < share), False, "")) for prompt in PROMPTS * 3)


CEILING, CHANCE = scores(1.0), scores(0.1)


def rendered(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def colours_of(axes) -> list[str]:
    return [line.get_color() for line in axes.lines if len(line.get_xdata()) > 2]


def test_the_contact_sheet_has_a_row_a_prompt_and_a_column_a_sampling_config():
    images = np.random.default_rng(0).integers(0, 256, (3, 36, 36, 3), dtype=np.uint8)
    columns = {"1 step": images, "4 steps": images[::-1], "training image": images}
    figure = contact_sheet(["a photo of a circle", "b", "c"], columns, {"1 step": [True, False, True]})
    assert len(figure.axes) == 9
    shown = [axes.images[0] for axes in figure.axes]
    assert all(image.get_interpolation() == "nearest" for image in shown)
    assert np.array_equal(shown[1].get_array(), images[1])  # down the first column
    assert np.array_equal(shown[3].get_array(), images[2])  # then the second
    marks = [axes.texts[0].get_text() for axes in figure.axes if axes.texts]
    assert marks == ["✓", "✗", "✓"]
    words = [text.get_text() for text in figure.texts]
    assert words == ["1 step", "4 steps", "training\nimage", "a circle", "b", "c"]
    assert rendered(figure).width > 400


def test_the_step_count_figure_has_a_panel_a_task_and_a_line_a_series():
    series = {"MeanFlow": {1: scores(0.3), 2: scores(0.5), 4: scores(0.9)}, "parent": {4: scores(0.8), 30: scores(1)}}
    figure = step_count_figure(series, CEILING, CHANCE)
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
    assert first.get_ydata() == pytest.approx([s.overall for s in series["MeanFlow"].values()])
    assert second.get_xdata().tolist() == [4, 30]
    assert [text.get_text() for text in overall.texts] == ["ceiling", "chance"]
    assert [text.get_text() for text in overall.get_legend().get_texts()] == ["MeanFlow", "parent"]
    assert rendered(figure).size == (1350, 520)


def test_the_training_curves_have_a_line_a_step_count_in_its_own_colour():
    names = ("overall", *TASKS)
    curves = {n: {name: [(0, 0.0), (500, 0.1 * n), (1000, 0.2 * n)] for name in names} for n in (1, 2, 4)}
    figure = training_curves(curves, CEILING, CHANCE, reference={4: scores(0.5), 30: scores(0.7)})
    assert len(figure.axes) == 7
    for axes in figure.axes:
        assert colours_of(axes) == [step_colour(1), step_colour(2), step_colour(4)]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["1 step", "2 steps", "4 steps", "parent", "parent, 30 steps"]
    assert rendered(figure).size == (1350, 520)


def test_curves_of_the_overall_score_alone_are_one_panel():
    figure = training_curves({1: {"overall": [(0, 0.0), (10, 0.2), (20, 0.3)]}})
    assert [axes.get_title() for axes in figure.axes] == ["overall"]
    assert rendered(figure).width < 700


def test_figures_leave_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    step_count_figure({"MeanFlow": {1: scores(0.3)}})
    assert dict(matplotlib.rcParams) == before
