"""Markdown tables."""

import pytest

from emf_lightning.evaluation.markdown import markdown_table


def test_a_table_has_a_heading_a_separator_and_a_line_for_each_row():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"


def test_columns_are_aligned_by_letter():
    assert markdown_table(["a", "b", "c"], [], align="lr").splitlines()[1] == "|:---|---:|---|"


def test_rows_of_another_length_and_unknown_letters_are_refused():
    with pytest.raises(ValueError, match="1 cells, the table has 2 columns"):
        markdown_table(["a", "b"], [["1"]])
    with pytest.raises(ValueError, match="align must be at most 1 letters of l, c, r, got 'x'"):
        markdown_table(["a"], [], align="x")
