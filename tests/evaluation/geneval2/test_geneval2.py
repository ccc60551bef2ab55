from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from emf_lightning.callbacks import FewStepSampling, StepSweep
from emf_lightning.evaluation.geneval2.geneval2 import GenEval2, read_items
from emf_lightning.evaluation.geneval2.judges import AnswerJudge, QwenJudge
from emf_lightning.evaluation.reports.report import Report
from emf_lightning.modules.flow_map import FlowMapModule
from tests.callbacks import tiny
from tests.evaluation.tiny_qwen3_vl import save_tiny_qwen3_vl

ITEMS = [
    ("two red dogs chasing a cat", 5, [
        ("How many dogs are in the image?", "two", "count"),
        ("Are the dogs red?", "Yes", "attribute"),
        ("Are there any dogs in the image?", "Yes", "object"),
        ("Are the dogs chasing the cat?", "Yes", "verb"),
        ("How many cats are in the image?", "one", "count"),
        ("Are there any cats in the image?", "Yes", "object"),
    ]),
    ("a cat on top of three sheeps", 4, [
        ("How many cats are in the image?", "one", "count"),
        ("Are there any cats in the image?", "Yes", "object"),
        ("Is the cat on top of the sheeps?", "Yes", "position"),
        ("How many sheeps are in the image?", "three", "count"),
        ("Are there any sheeps in the image?", "Yes", "object"),
    ]),
    ("a dog and a red cat and a sheep", 4, [
        ("Are there any dogs in the image?", "Yes", "object"),
        ("Is the cat red?", "Yes", "attribute"),
        ("Are there any cats in the image?", "Yes", "object"),
        ("Are there any sheeps in the image?", "Yes", "object"),
    ]),
]  # fmt: skip
PROMPTS = [prompt for prompt, _, _ in ITEMS]
ASKED = [[(question, answer.lower()) for question, answer, _ in questions] for _, _, questions in ITEMS]
SKILLS = [[skill for _, _, skill in questions] for _, _, questions in ITEMS]
DIGITS = {"one": "1", "two": "2", "three": "3"}
WORDS = [
    *("How", "many", "Are", "Is", "the", "there", "any", "in", "image", "Answer", "one", "word", "?", "."),
    *("dogs", "cat", "cats", "sheeps", "red", "chasing", "on", "top", "of"),
    *("yes", "Yes", "no", "No", "One", "two", "Two", "three", "Three", "1", "2", "3"),
]


def row_of(prompt, atoms, questions) -> dict:
    asked, skills = [[question, answer] for question, answer, _ in questions], [skill for *_, skill in questions]
    return {"prompt": prompt, "atom_count": atoms, "vqa_list": asked, "skills": skills}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("geneval2") / "geneval2_data.jsonl"
    path.write_text("".join(json.dumps(row_of(*item)) + "\n" for item in ITEMS))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    shards = tiny.shards(tmp_path_factory.mktemp("shards"))
    return tiny.data(shards, validation_shards=str(shards), validation_samples=8)


class Painter(FlowMapModule):
    """Paints image i of a batch, of the i-th prompt, in the grey level of its prompt; ``shift`` takes another's."""

    def __init__(self, shift: int = 0, noise: bool = False) -> None:
        super().__init__(tiny.network())
        levels = (np.arange(len(PROMPTS)) + shift) % len(PROMPTS) * 20
        self.images = np.broadcast_to(levels[:, None, None, None], (len(PROMPTS), 36, 36, 3)).astype(np.uint8)
        if noise:
            self.images = np.random.default_rng(0).integers(0, 256, self.images.shape, np.uint8)

    def sample_latents(self, text, null, noise, steps, guidance_scale=None):
        return torch.from_numpy(self.images[: len(noise)].copy()).permute(0, 3, 1, 2) / 127.5 - 1


class Reader(AnswerJudge):
    """Says of an image in a prompt's grey level yes to the prompt's questions; of others it knows nothing."""

    name = "reader"
    vocabulary = ("yes", "no", "one", "two", "three")

    def tokens(self, spelling):
        word = spelling.strip().lower()
        return [self.vocabulary.index(word)] if spelling == word and word in self.vocabulary else []

    def text(self, token):
        return self.vocabulary[token]

    def probabilities(self, image, question):
        right = dict(ASKED[int(image.mean()) // 20]).get(question)
        if right is None:
            return np.full(5, 0.2, np.float32)
        return np.eye(5, dtype=np.float32)[self.vocabulary.index(right)]


@pytest.fixture
def one_task(table, tmp_path):
    """The benchmark with one number of atoms, of which FewStepSampling draws each prompt once, in their order."""
    path = tmp_path / "one.jsonl"
    rows = [row_of(prompt, 4, questions) for prompt, _, questions in ITEMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawing(model, data, run, metric, **arguments) -> dict[str, float]:
    drawn = {"images_per_task": 3, "final_images_per_task": 3, "at_start": False, "figures": False}
    callback = FewStepSampling(benchmarks=[metric], steps=[1], **drawn | arguments)
    tiny.trainer(run, callback, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    (row,) = map(json.loads, (run / metric.name / "scores.jsonl").read_text().splitlines())
    return row["metrics"][metric.name]["values"]


def test_an_oracle_scores_a_hundred_and_a_model_of_other_prompts_what_the_judge_guesses(one_task, data, tmp_path):
    found = drawing(Painter(), data, tmp_path / "oracle", GenEval2(one_task, Reader()))
    names = {"score", "soft_tifa_am", "4 atoms", *(f"{skill} questions" for skills in SKILLS for skill in skills)}
    assert found.keys() - {"se", "width", "height"} == names
    assert {name: found[name] for name in names} == pytest.approx(dict.fromkeys(names, 100))
    assert (found["width"], found["height"]) == (36, 36)

    other = drawing(Painter(shift=1), data, tmp_path / "other", GenEval2(one_task, Reader()))
    values = [
        [0.2 if q not in dict(ASKED[(k + 1) % 3]) else float(dict(ASKED[(k + 1) % 3])[q] == a) for q, a in ASKED[k]]
        for k in range(3)
    ]
    geometric = [np.prod(row) ** (1 / len(row)) for row in values]
    assert other["score"] == pytest.approx(100 * np.mean(geometric), abs=1e-4)
    assert other["soft_tifa_am"] == pytest.approx(100 * np.mean([np.mean(row) for row in values]), abs=1e-4)


def test_a_judge_that_finds_all_tokens_alike_scores_the_share_of_spellings(one_task, data, tmp_path):
    judge = QwenJudge(save_tiny_qwen3_vl(tmp_path / "judge", WORDS, answer=""), device="cpu", dtype="float32")
    size = judge.network.config.text_config.vocab_size
    found = drawing(Painter(noise=True), data, tmp_path / "run", GenEval2(one_task, judge))
    assert found["object questions"] == found["verb questions"] == pytest.approx(100 * 4 / size, abs=1e-4)
    assert found["count questions"] == pytest.approx(100 * 6 / size, abs=1e-4)  # digits, too
    logs = [np.mean([np.log((6 if q.startswith("How") else 4) / size) for q, _ in asked]) for asked in ASKED]
    assert found["score"] == pytest.approx(100 * np.mean(np.exp(logs)), abs=1e-4)


def test_a_judge_that_always_says_yes_scores_the_share_of_such_questions(one_task, data, tmp_path):
    judge = QwenJudge(save_tiny_qwen3_vl(tmp_path / "judge", WORDS, answer="Yes"), device="cpu", dtype="float32")
    found = drawing(Painter(noise=True), data, tmp_path / "run", GenEval2(one_task, judge))
    assert (
        found["object questions"]
        == found["attribute questions"]
        == found["verb questions"]
        == pytest.approx(100, abs=1e-4)
    )
    assert found["count questions"] == pytest.approx(0, abs=1e-4)
    shares = [np.mean([answer == "yes" for _, answer in asked]) for asked in ASKED]
    assert found["soft_tifa_am"] == pytest.approx(100 * np.mean(shares), abs=1e-4)
    assert found["score"] == pytest.approx(100 / 3, abs=1e-3)  # of the one prompt without a number


@pytest.mark.parametrize(("spellings", "spaces"), [("official", True), ("distinct", False)])
def test_scores_are_those_of_the_models_own_generation(one_task, data, tmp_path, spellings, spaces):
    folder = save_tiny_qwen3_vl(tmp_path / "judge", WORDS, spaces)
    metric = GenEval2(one_task, QwenJudge(folder, device="cpu", dtype="float32"), spellings)
    model = Painter(noise=True)
    found = drawing(model, data, tmp_path / "run", metric)

    network, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    values = []
    for image, asked in zip(model.images, ASKED, strict=True):
        values.append([])
        for question, answer in asked:
            turn = [{"type": "image"}, {"type": "text", "text": f"{question} Answer in one word."}]
            chat = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            inputs = processor(text=[chat], images=[Image.fromarray(image)], return_tensors="pt")
            settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            (logits,) = network.eval().generate(**inputs, **settings).logits
            shares = np.exp(logits[0].double().numpy() - np.logaddexp.reduce(logits[0].double().numpy()))
            words = [answer, answer.title(), f" {answer}", f" {answer.title()}"]
            words += [DIGITS[answer], f" {DIGITS[answer]}"] if question.startswith("How many") else []
            first = [processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
            values[-1].append(sum(shares[token] for token in (first if spellings == "official" else set(first))))
    assert np.ptp(np.concatenate(values)) > 0.1, "neither image nor question has a say"

    expected = {
        "score": 100 * np.mean([np.exp(np.mean(np.log(row))) for row in values]),
        "soft_tifa_am": 100 * np.mean([np.mean(row) for row in values]),
    }
    flat = [
        (skill, value)
        for skills, row in zip(SKILLS, values, strict=True)
        for skill, value in zip(skills, row, strict=True)
    ]
    for skill in {skill for skill, _ in flat}:
        expected[f"{skill} questions"] = 100 * np.mean([value for name, value in flat if name == skill])
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    tokens = metric.settings()["tokens"]
    assert len(tokens["yes"]) == (2 if (spellings, spaces) == ("distinct", False) else 4)
    assert len(tokens["number one"]) == (3 if (spellings, spaces) == ("distinct", False) else 6)


def test_reports_have_a_row_with_the_size_and_the_tokens(one_task, data, tmp_path):
    metric = GenEval2(one_task, Reader())
    sweep = StepSweep(benchmarks=[metric], steps=[1, 4], images_per_prompt=1)
    tiny.trainer(tmp_path / "run", sweep).test(Painter(), datamodule=data, verbose=False)
    rows = Report.read(tmp_path / "run/report.json").rows
    assert [(row.steps, row.scores["score"], row.scores["width"]) for row in rows] == [(1, 100, 36), (4, 100, 36)]
    assert rows[0].settings["tokens"] == {"yes": [0], "number one": [2], "number two": [3], "number three": [4]}
    text = (tmp_path / "run/report.md").read_text()
    assert "## GenEval 2 (reader as judge)" in text and "soft_tifa_am" in text
    lines = [
        json.loads(line) for line in (tmp_path / "run/results" / f"{metric.name}-1step.jsonl").read_text().splitlines()
    ]
    assert [line["answers"] for line in lines] == [[1.0] * len(asked) for asked in ASKED]


def test_atoms_are_tasks_with_means_of_their_own(table):
    metric = GenEval2(table, Reader())
    assert {task: list(places) for task, places in metric.tasks().items()} == {"5 atoms": [0], "4 atoms": [1, 2]}
    images = Painter().images
    metric.update([images[0], images[1], images[1]], PROMPTS)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["5 atoms"] == 100 and found["4 atoms"] < 100


def test_more_images_of_a_prompt_are_averaged_under_another_name(table, data, tmp_path):
    trainer = tiny.trainer(tmp_path / "run", StepSweep(benchmarks=[GenEval2(table, Reader())], images_per_prompt=2))
    with pytest.raises(ValueError, match=r"\(reader as judge\): 2 images of a prompt, but images_per_prompt is 1"):
        trainer.test(Painter(), datamodule=data, verbose=False)
    metric = GenEval2(table, Reader(), images_per_prompt=2)
    assert metric.name == "geneval2_reader_2_images" and GenEval2(table, Reader()).name == "geneval2_reader"
    metric.check_requests(PROMPTS * 2)
    images = Painter().images
    metric.update([images[0], images[1]], [PROMPTS[0]] * 2)
    alone = GenEval2(table, Reader())
    alone.update([images[1]], [PROMPTS[0]])
    assert float(metric.compute()["score"]) == pytest.approx(50 + float(alone.compute()["score"]) / 2)
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        GenEval2(table, Reader(), images_per_prompt=0)


GOOD = row_of(*ITEMS[0])


def asking(question: list[str]) -> bytes:
    return json.dumps(GOOD | {"vqa_list": [question], "skills": ["count"]}).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read benchmark .*non-commercial use alone, and it is not shipped"),
        (b"\xff\xfe\x00", "cannot read benchmark"),
        (b"\n\n", "holds no prompt"),
        (b"{", "line 1: .*as it is"),
        (b"[]", "line 1: "),
        (b"7", "line 1: "),
        (json.dumps({k: v for k, v in GOOD.items() if k != "vqa_list"}).encode(), "line 1: no 'vqa_list'"),
        (json.dumps(GOOD | {"prompt": " "}).encode(), "line 1: prompt ' ' is no text"),
        (json.dumps(GOOD | {"prompt": 5}).encode(), "line 1: prompt 5 is no text"),
        (json.dumps(GOOD | {"skills": ["count"]}).encode(), "line 1: 6 questions and 1 skills"),
        (json.dumps(GOOD | {"vqa_list": [], "skills": []}).encode(), "line 1: 0 questions and 0 skills"),
        (asking(["How many dogs?", "many"]), "'many', none of one"),
        (asking(["How many dogs?", "2"]), "'2', none of one"),
        (asking(["Is it red?", "red"]), "'red', none of yes, no"),
        (asking(["Is it red?"]), "line 1: "),
        (json.dumps(GOOD | {"atom_count": "many"}).encode(), "line 1: "),
        ((json.dumps(GOOD) + "\n" + json.dumps(GOOD)).encode(), "line 2: the prompt .* is there twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_benchmarks_is_one_sentence(tmp_path, content, said):
    path = tmp_path / "geneval2_data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"GenEval2: .*{said}"):
        read_items(path)


def test_a_prompt_of_another_benchmark_and_a_missing_judge_are_refused(table):
    with pytest.raises(ValueError, match="'a dog' is none of its 3 prompts"):
        GenEval2(table, Reader()).update([np.zeros((8, 8, 3), np.uint8)], ["a dog"])
    with pytest.raises(ValueError, match=r"QwenJudge: cannot load model='Qwen/Qwen3-VL-8B-Instruct'.*hf download"):
        QwenJudge()


@pytest.mark.parametrize("place", [0, -1])
def test_a_judge_without_finite_probabilities_is_refused(table, place):
    class Overflowing(Reader):
        def probabilities(self, image, question):
            asked = [text for text, _ in ASKED[0]]
            return super().probabilities(image, question) * (np.nan if question == asked[place] else 1)

    metric = GenEval2(table, Overflowing())
    with pytest.raises(ValueError, match="not finite; give it dtype bfloat16"):
        metric.update([np.zeros((8, 8, 3), np.uint8)], metric.prompts()[:1])
