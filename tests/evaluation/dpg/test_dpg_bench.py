from __future__ import annotations

import csv
from pathlib import PurePath

import numpy as np
import pytest

from emf_lightning.evaluation.dpg.dpg_bench import COLUMNS, DpgBench, tiles_of
from emf_lightning.evaluation.dpg.vqa_models import VqaModel

ROWS = [
    ("one", "a red cat on a mat", 1, "0", "entity - whole (cat)", "is there a cat?"),
    ("one", "a red cat on a mat", 2, "1", "attribute - color (cat, red)", "is the cat red?"),
    ("one", "a red cat on a mat", 3, "2", "relation - spatial (cat, mat)", "is the red cat on a mat?"),
    ("two", "a dog", 1, "0", "entity - whole (dog)", "is there a dog?"),
    ("two", "a dog", 2, "0", "global - style", "is it a photo?"),
]
BLANK = np.zeros((8, 8, 3), np.uint8)


class Scripted(VqaModel):
    """Says no to the questions that are listed for a image's grey level, yes to the others."""

    name = "scripted"

    def __init__(self, no: dict[int, set[str]] | set[str]) -> None:
        self.no = no

    def answer(self, image, questions):
        no = self.no.get(int(image.mean()), set()) if isinstance(self.no, dict) else self.no
        return ["no" if question in no else "yes" for question in questions]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "dpg_bench.csv"
    write(path, ROWS)
    return path


def write(path, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def scores(metric, image=BLANK) -> dict[str, float]:
    metric.update([image, image], ["a red cat on a mat", "a dog"])
    return {name: value.item() for name, value in metric.compute().items()}


def test_yes_to_everything_scores_a_hundred(table):
    found = scores(DpgBench(table, Scripted(set())))
    assert found["score"] == 100
    assert {name for name, value in found.items() if value == 100} == {
        "score",
        *("entity", "attribute", "relation", "global"),
        *("entity - whole", "attribute - color", "relation - spatial", "global - style"),
    }


def test_kinds_of_questions_are_counted_coarse_and_fine(tmp_path):
    write(tmp_path / "table.csv", [*ROWS, ("two", "a dog", 3, "0", "entity - part (dog, tail)", "has it a tail?")])
    found = scores(DpgBench(tmp_path / "table.csv", Scripted({"has it a tail?"})))
    assert (found["entity"], found["entity - whole"], found["entity - part"]) == (pytest.approx(200 / 3), 100, 0)


def test_a_no_goes_down_the_whole_graph(table):
    found = scores(DpgBench(table, Scripted({"is there a cat?"})))
    assert found["score"] == pytest.approx((0 + 100) / 2)
    assert (found["entity"], found["attribute"], found["relation"]) == (50, 0, 0)


def test_a_leafs_no_leaves_its_parents(table):
    found = scores(DpgBench(table, Scripted({"is the red cat on a mat?", "is it a photo?"})))
    assert found["score"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_a_grid_is_four_images_read_row_by_row(table):
    grid = np.zeros((16, 16, 3), np.uint8)
    for number, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        grid[y : y + 8, x : x + 8] = 10 * number
    assert [int(tile.mean()) for tile in tiles_of(grid, 8)] == [0, 10, 20, 30]

    model = Scripted({0: {"is there a dog?"}, 30: {"is there a dog?", "is there a cat?"}})
    found = scores(DpgBench(table, model, tile=8), grid)
    cat, dog = (1 + 1 + 1 + 0) / 4, (0.5 + 1 + 1 + 0.5) / 4
    assert found["score"] == pytest.approx(100 * (cat + dog) / 2)
    with pytest.raises(ValueError, match="8 x 8 is no grid of four of side tile=8"):
        tiles_of(BLANK, 8)


def test_the_published_scripts_way_of_counting(table, tmp_path):
    # its first question is dropped, so that the first prompt's others have no parent and the prompt is left out
    metric = DpgBench(table, Scripted({"is it a photo?"}), official=True)
    assert metric.settings()["prompts"] == 1
    # but folders have an image of it
    assert metric.prompt_of(PurePath("one.png")) == "a red cat on a mat"
    assert list(metric.prompts()) == ["a red cat on a mat", "a dog"]
    assert scores(metric)["score"] == 50
    assert [row["dpg_scripted_official"] for row in metric.rows] == [None, 0.5]
    with pytest.raises(ValueError, match="is none of its 1 prompts"):
        metric.update([BLANK], ["a cat"])
    assert [metric.prompts()[place] for place, _ in metric.requests(2)] == ["a dog", "a dog"], "drawn in training"

    # categories: the last of four images, and answers whatever the parents'
    swapped = tmp_path / "swapped.csv"
    write(swapped, [*ROWS[3:], *ROWS[:3]])
    grid = np.zeros((16, 16, 3), np.uint8)
    grid[8:, 8:] = 30
    no = {0: {"is the red cat on a mat?"}, 30: {"is there a cat?"}}
    official = scores(DpgBench(swapped, Scripted(no), tile=8, official=True), grid)
    ours = scores(DpgBench(swapped, Scripted(no), tile=8), grid)
    assert (official["entity"], official["attribute"], official["relation"]) == (0, 100, 100)
    assert (ours["entity"], ours["attribute"], ours["relation"]) == (100 * 7 / 8, 75, 0)


def test_another_vqa_model_is_in_the_name(table):
    metric = DpgBench(table, Scripted(set()))
    assert (metric.name, metric.title) == ("dpg_scripted", "DPG-Bench (scripted as judge)")
    assert metric.prompt_of(PurePath("two.png")) == "a dog"
    metric = DpgBench(table, Scripted(set()), official=True)
    assert metric.name == "dpg_scripted_official"
    assert metric.title == "DPG-Bench (scripted as judge, counted as the published script does)"


def test_two_items_of_one_text_count_twice(tmp_path):
    write(tmp_path / "table.csv", [*ROWS, ("three", "a dog", 1, "0", "global - style", "is it a photo?")])
    found = scores(DpgBench(tmp_path / "table.csv", Scripted({"is it a photo?"})))
    dog = (1 / 2 + 0) / 2  # its image, averaged over both items
    assert found["score"] == pytest.approx(100 * (1 + dog + dog) / 3)


def test_settings_tell_other_tables_ways_of_counting_and_models_apart(table, tmp_path):
    write(tmp_path / "other.csv", [*ROWS[:-1], ("two", "a dog", 2, "0", "global - style", "is it a drawing?")])
    settings = DpgBench(table, Scripted(set())).settings()

    assert settings["judge"] == "Scripted"
    assert (
        DpgBench(tmp_path / "other.csv", Scripted(set())).settings() | {"benchmark": settings["benchmark"]} == settings
    )
    assert DpgBench(tmp_path / "other.csv", Scripted(set())).settings() != settings
    assert DpgBench(table, Scripted(set()), official=True).settings() != settings


def test_tables_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read benchmark .*give dpg_bench\.csv"):
        DpgBench(tmp_path / "none.csv", Scripted(set()))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'item_id'"):
        DpgBench(tmp_path / "other.csv", Scripted(set()))
    write(tmp_path / "words.csv", [("x", "t", "one", "0", "entity", "?")])
    with pytest.raises(ValueError, match="a question of x has no whole numbers"):
        DpgBench(tmp_path / "words.csv", Scripted(set()))
    write(tmp_path / "orphan.csv", [("x", "t", 2, "1", "entity", "?")])
    with pytest.raises(ValueError, match="a question of x depends on one that is not there"):
        DpgBench(tmp_path / "orphan.csv", Scripted(set()))
