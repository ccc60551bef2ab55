"""Markdown tables."""

import pytest

from emf_lightning.evaluation.markdown import markdown_table


def test_a_table_has_a_heading_a_separator_and_a_line_for_each_row():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="1 cells, the table has 2 columns"):
        markdown_table(["a", "b"], [["1"]])
