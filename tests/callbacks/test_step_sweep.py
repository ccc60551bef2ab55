from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from emf_lightning.callbacks import FewStepSampling, StepSweep, WeightEMA
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.evaluation.distances.diversity import VendiScore
from emf_lightning.evaluation.distances.fid_kid import FrechetDistance
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.dpg.dpg_bench import DpgBench
from emf_lightning.evaluation.fixed_noise import fixed_noise
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.reports.report import Report
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from tests.callbacks import tiny
from tests.callbacks.oracle import NoiseKeeper, Oracle, Twice
from tests.evaluation.dpg.test_dpg_bench import Scripted, write

SUITE = ShapesSuite(per_task=4, scenes_per_task=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    """Of two steps, with averages that differ from what was trained."""
    run = tmp_path_factory.mktemp("trained") / "run"
    saver = ModelCheckpoint(run / "checkpoints", save_last=True, every_n_train_steps=2)
    trainer = tiny.trainer(run, WeightEMA(decay=0.5), saver, max_steps=2, enable_checkpointing=True)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))
    return run / "checkpoints/last.ckpt"


def sweep(**arguments) -> StepSweep:
    small = {"benchmarks": [SuiteScore(SUITE)], "steps": [1, 2], "images_per_prompt": 2}
    return StepSweep(**{**small, **arguments})


def evaluated(run, shards, callback, model=None, checkpoint=None, **arguments) -> Report:
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=8)
    trainer = tiny.trainer(run, callback, **arguments)
    trainer.test(model or tiny.meanflow(), datamodule=data, ckpt_path=checkpoint, verbose=False)
    return Report.read(run / "report.json")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_oracle_scores_one_at_every_step_count_and_its_lines_agree(shards, tmp_path):
    report = evaluated(tmp_path / "run", shards, sweep(), Oracle(SUITE, lambda prompt: prompt))

    assert [(row.steps, row.weights, row.nfe) for row in report.rows] == [(1, "trained", 1), (2, "trained", 2)]
    assert all(row.scores["score"] == 1 for row in report.rows)
    assert all(row.images == 2 * len(SUITE.prompts()) for row in report.rows)
    rows = rows_of(tmp_path / "run/results/shapes-2step.jsonl")
    assert len(rows) == len({row["filename"] for row in rows}) == 2 * len(SUITE.prompts())
    assert all(row["correct"] for row in rows)


def test_rows_agree_with_an_independent_count_of_the_lines(shards, tmp_path):
    odd = SUITE.prompts()[1::2]
    model = Oracle(SUITE, lambda prompt: prompt if prompt in odd else None)
    report = evaluated(tmp_path / "run", shards, sweep(), model)

    shares: dict[str, list[bool]] = {}
    for row in rows_of(tmp_path / "run/results/shapes-1step.jsonl"):
        shares.setdefault(row["tag"], []).append(row["correct"])
    assert report.rows[0].scores["score"] == pytest.approx(np.mean([np.mean(values) for values in shares.values()]))
    assert f"**{report.rows[0].scores['score']:.3f}**" in (tmp_path / "run/report.md").read_text()
    assert (tmp_path / "run/report.png").stat().st_size > 5000


def test_trained_weights_are_scored_beside_the_averages(shards, checkpoint, tmp_path):
    sampled: dict[str, list[torch.Tensor]] = {}

    class Recorder(type(tiny.meanflow())):
        def sample_latents(self, *arguments, **options):
            key = next(self.net.parameters()).detach().double().sum().item()
            sampled.setdefault(key, [])
            return super().sample_latents(*arguments, **options)

    model = Recorder(tiny.network())
    report = evaluated(tmp_path / "run", shards, sweep(steps=[1]), model, checkpoint)
    saved = torch.load(checkpoint, weights_only=True)
    name = "net." + next(iter(dict(model.net.named_parameters())))
    expected = [saved[key][name].double().sum().item() for key in ("state_dict", "current_model_state")]

    assert [(row.weights, row.step) for row in report.rows] == [("averaged", 2), ("trained", 2)]
    assert list(sampled) == pytest.approx(expected)
    assert expected[0] != expected[1]
    assert next(model.net.parameters()).detach().double().sum().item() == pytest.approx(expected[0]), "not put back"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with an image of each prompt."""
    folder = tmp_path_factory.mktemp("reference")
    for number, prompt in enumerate(SUITE.prompts()):
        scene = scene_for(SUITE.world, prompt, np.random.default_rng(number))
        Image.fromarray(scene.render(SUITE.world)).save(folder / f"{number}.png")
    return folder


def test_guidance_scales_cost_twice_and_further_metrics_see_the_same_images(shards, reference, tmp_path):
    fid = FrechetDistance(RandomFeatures(width=8), reference)
    report = evaluated(
        tmp_path / "run", shards, sweep(extra_metrics=[fid], steps=[1], guidance_scale=[1.0, 2.0], images_per_prompt=1)
    )

    assert [(row.metric, row.guidance_scale, row.nfe) for row in report.rows] == [
        ("shapes", 1.0, 1),
        ("fid_random", 1.0, 1),
        ("shapes", 2.0, 2),
        ("fid_random", 2.0, 2),
    ]
    assert report.rows[1].scores["images"] == len(SUITE.prompts())
    assert fid.images == 0, "the metric itself stays fresh"


def questions(folder, count: int = 3) -> DpgBench:
    """A question about each of some prompts, and a second one about the first."""
    table = folder / "dpg_bench.csv"
    texts = [prompt.prompt for prompt in SUITE.prompts()[:count]]
    rows = [(f"item{i}", text, 1, "0", "entity - whole", "is it there?") for i, text in enumerate(texts)]
    rows += [("item0", texts[0], 2, "1", "attribute - color", "is it red?")]
    write(table, rows)
    return DpgBench(table, Scripted({"is it red?"}))


def test_further_metrics_of_several_benchmarks_have_tables_of_their_own(shards, reference, tmp_path):
    fid = FrechetDistance(RandomFeatures(width=8), reference)
    callback = sweep(
        benchmarks=[SuiteScore(SUITE), questions(tmp_path)], extra_metrics=[fid], steps=[1], images_per_prompt=1
    )
    report = evaluated(tmp_path / "run", shards, callback)

    assert [(rows[0].metric, rows[0].benchmark, len(rows)) for rows in report.groups()] == [
        ("shapes", "shapes", 1),
        ("fid_random", "shapes", 1),
        ("dpg_scripted", "dpg_scripted", 1),
        ("fid_random", "dpg_scripted", 1),
    ]
    text = (tmp_path / "run/report.md").read_text()
    assert "## FID (random features), images of shapes world\n" in text
    assert "## FID (random features), images of DPG-Bench (scripted as judge)\n" in text


def test_a_number_of_images_that_any_benchmark_lacks_is_said_before_the_first_is_sampled(shards, reference, tmp_path):
    class Idle(Oracle):
        def sample_latents(self, *arguments, **options):
            raise AssertionError("sampled an image")

    fid = FrechetDistance(RandomFeatures(width=8), reference, count=len(SUITE.prompts()))  # and not three
    callback = sweep(
        benchmarks=[SuiteScore(SUITE), questions(tmp_path)], extra_metrics=[fid], steps=[1], images_per_prompt=1
    )
    with pytest.raises(ValueError, match="3 images, but count is"):
        evaluated(tmp_path / "run", shards, callback, Idle(SUITE, lambda prompt: prompt))


def test_a_sweep_that_breaks_off_leaves_what_it_has_found(shards, tmp_path):
    class Dying(Oracle):
        def sample_latents(self, text, null, noise, steps, guidance_scale=None):
            if steps == 2:
                raise RuntimeError("out of memory")
            return super().sample_latents(text, null, noise, steps, guidance_scale)

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(tmp_path / "run", shards, sweep(), Dying(SUITE, lambda prompt: prompt))
    report = Report.read(tmp_path / "run/report.json")
    assert [(row.steps, row.scores["score"]) for row in report.rows] == [(1, 1.0)]
    assert report.about["so far"] == "1 of 2 ways"
    assert len(rows_of(tmp_path / "run/results/shapes-1step.jsonl")) == 2 * len(SUITE.prompts())
    assert not (tmp_path / "run/results/shapes-2step.jsonl").exists()


def test_a_model_of_other_prompts_scores_chance_which_the_report_says_beside_the_ceiling(shards, tmp_path):
    suite, rng = ShapesSuite(per_task=20, scenes_per_task=40), np.random.default_rng(1)
    by_task: dict[str, list] = {}
    for prompt in suite.prompts():
        by_task.setdefault(prompt.tag, []).append(prompt)

    class Deaf(Oracle):
        def sample_latents(self, *arguments, **options):
            self.answers = [other(prompt) for prompt in suite.prompts()]  # anew for each batch
            return super().sample_latents(*arguments, **options)

    def other(prompt):
        others = [known for known in by_task[prompt.tag] if known != prompt]
        return others[rng.integers(len(others))]

    callback = sweep(benchmarks=[SuiteScore(suite)], steps=[1])
    report = evaluated(tmp_path / "run", shards, callback, Deaf(suite, other))
    scores, levels = report.rows[0].scores, report.levels["shapes"]

    chance = suite.chance()
    error = np.hypot(scores["se"], chance.standard_error)
    assert 0 < chance.overall < 0.3
    assert abs(scores["score"] - chance.overall) < 3 * error
    assert levels["chance"]["score"] == pytest.approx(chance.overall)
    assert levels["ceiling"]["score"] == pytest.approx(suite.ceiling().overall)
    text = (tmp_path / "run/report.md").read_text()
    assert f"| chance: of another prompt of its task |  |  | {chance.correct['single_object']:.3f} |" in text
    assert "| seen | held out |" in text
    assert f"| {scores['seen']:.3f} | {scores['held_out']:.3f} ± {scores['held_out_se']:.3f} |" in text


def test_a_graph_of_questions_is_a_benchmark_too(shards, tmp_path):
    benchmark = questions(tmp_path)
    report = evaluated(tmp_path / "run", shards, sweep(benchmarks=[benchmark], steps=[1]))

    (row,) = report.rows
    assert (row.metric, row.images) == ("dpg_scripted", 6)
    assert row.scores["score"] == pytest.approx(100 * (0.5 + 1 + 1) / 3)
    assert row.scores["attribute"] == 0
    text = (tmp_path / "run/report.md").read_text()
    assert "## DPG-Bench and HPS v2.1" in text
    assert "## DPG-Bench (scripted as judge): categories" in text


def test_seeds_sample_anew_and_their_spread_is_reported(shards, tmp_path):
    class Corrupt(Oracle):
        """Generates a blank from three noises in ten."""

        def sample_latents(self, text, null, noise, steps, guidance_scale=None):
            images = super().sample_latents(text, null, noise, steps, guidance_scale)
            lost = noise.flatten(1)[:, 0, None, None, None] < torch.distributions.Normal(0, 1).icdf(torch.tensor(0.3))
            return torch.where(lost, torch.full_like(images, 0.2), images)

    report = evaluated(tmp_path / "run", shards, sweep(steps=[1], seeds=[0, 1, 2]), Corrupt(SUITE, lambda p: p))
    row = report.rows[0]
    assert row.images == 6 * len(SUITE.prompts())
    assert abs(row.scores["score"] - 0.7) < 3 * row.scores["se"]
    assert 0 < row.seed_spread < 0.2
    files = [line["filename"] for line in rows_of(tmp_path / "run/results/shapes-1step.jsonl")]
    assert len(files) == len(set(files)) == row.images


def test_two_ranks_find_what_one_finds(shards, tmp_path):
    odd = SUITE.prompts()[1::2]
    reports = [
        evaluated(tmp_path / name, shards, sweep(), Oracle(SUITE, lambda p: p if p in odd else None), **arguments)
        for name, arguments in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"}))
    ]
    assert reports[0].rows[0].scores == reports[1].rows[0].scores
    lines = [rows_of(tmp_path / name / "results/shapes-1step.jsonl") for name in ("one", "two")]
    # the oracle places objects at random; whether an image shows its prompt is fixed
    one, two = ([(row["filename"], row["prompt"], row["correct"]) for row in rows] for rows in lines)
    assert one == two


def test_the_sweep_takes_the_place_of_the_other_callbacks_test(shards, tmp_path):
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=8)
    few = FewStepSampling(suite=SUITE, steps=[1], final_images_per_task=1, figures=False)
    tiny.trainer(tmp_path / "run", few, sweep(steps=[1], images_per_prompt=1)).test(
        tiny.meanflow(), datamodule=data, verbose=False
    )
    assert (tmp_path / "run/report.md").is_file()
    assert not (tmp_path / "run/shapes").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"benchmarks": []}, "benchmarks is empty"),
        ({"benchmarks": [SuiteScore(SUITE), SuiteScore(SUITE)]}, "benchmarks of one name"),
        ({"extra_metrics": [VendiScore(), VendiScore()]}, "two of extra_metrics have the name vendi_random"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1"),
        ({"steps": [0]}, "steps must be different whole numbers"),
    ],
)
def test_senseless_settings_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        sweep(**arguments)


def test_a_metric_without_prompts_is_no_benchmark(tmp_path):
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="FrechetDistance has no prompts of its own; put it into `extra_metrics`"):
        sweep(benchmarks=[FrechetDistance(RandomFeatures(width=8), tmp_path)])


@pytest.mark.parametrize("batch_size", [3, 64])
def test_equal_prompts_of_a_benchmark_have_noises_and_files_of_their_own(shards, tmp_path, batch_size):
    suite = Twice(per_task=4, scenes_per_task=4)
    texts, model = [prompt.prompt for prompt in suite.prompts()], NoiseKeeper(suite)
    callback = sweep(benchmarks=[SuiteScore(suite)], steps=[1], batch_size=batch_size)
    report = evaluated(tmp_path / "run", shards, callback, model)
    rows = rows_of(tmp_path / "run/results/shapes-1step.jsonl")
    assert report.rows[0].images == len(rows) == 2 * len(texts)
    assert report.rows[0].scores["score"] == 1
    files = {row["filename"]: row["prompt"] for row in rows}
    assert files == {f"{n:05d}/samples/{i:04d}.png": text for n, text in enumerate(texts) for i in range(2)}
    for row, noise in zip(rows, model.noises, strict=True):
        number, image = int(row["filename"][:5]), int(row["filename"][-8:-4])
        occurrence = texts[:number].count(texts[number])
        assert torch.equal(noise, fixed_noise(0, texts[number], occurrence * 2 + image, noise.shape))


def test_a_suite_that_means_two_things_by_one_text_is_refused():
    suite = Twice(per_task=4, scenes_per_task=4)
    suite._prompts = (*suite._prompts[1:], replace(suite._prompts[0], tag="counting"))
    with pytest.raises(ValueError, match="SuiteScore: shapes has different prompts of the text 'a photo of"):
        SuiteScore(suite)
