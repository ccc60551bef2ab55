from __future__ import annotations

import json

from emf_lightning.data.geneval_prompts import single_object
from emf_lightning.evaluation.geneval.result_rows import result_row, sample_path
from emf_lightning.evaluation.geneval.verdict import Verdict


def test_a_row_has_the_fields_of_genevals_results():
    row = result_row(single_object("dog"), Verdict(True, False, "", {"dog": [[0.0, 1.0, 2.0, 3.0, 0.9]]}))
    assert list(row) == ["tag", "prompt", "correct", "strict", "reason", "metadata", "details"]
    assert json.loads(row["metadata"])["include"] == [{"class": "dog", "count": 1}]
    assert json.loads(row["details"]) == {"dog": [[0.0, 1.0, 2.0, 3.0, 0.9]]}


def test_files_are_numbered_by_prompt_and_image():
    assert sample_path(12, 3) == "00012/samples/0003.png"
