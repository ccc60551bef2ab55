"""Prompts without a judge, and any benchmark, during training and in `emf test`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from emf_lightning.callbacks import ExperimentProgressBar, FewStepSampling, StepSweep
from emf_lightning.cli import main
from emf_lightning.evaluation.distances.fid_kid import FrechetDistance, KernelDistance
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.image_metric import PromptMeans
from emf_lightning.evaluation.own_prompts import OwnPrompts
from emf_lightning.evaluation.reports.report import Report
from emf_lightning.evaluation.score_history import ScoreHistory
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.modules.joint_distillation import JointDistillation
from tests.callbacks import tiny
from tests.data.reading.test_sources import imagefolder, jsonl
from tests.data.tars import noise_image

PROMPTS = ["a fox for $5", "ein Fuchs für 5 €", "x" * 300]


class Brightness(PromptMeans):
    """Mean grey value of two styles of prompts, darker is better."""

    name, title, unit = "brightness", "Brightness", "grey value"
    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(["one", "two", "three", "four"], ["odd", "even", "odd", "even"])

    def values(self, images, prompts):
        return [float(image.mean()) for image in images]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


def fit(run, shards, callback, *others, **arguments):
    """A training of four steps with validation samples; returns its trainer."""
    torch.manual_seed(5)
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
    trainer = tiny.trainer(run, callback, *others, limit_val_batches=0, **arguments)
    trainer.fit(tiny.meanflow(), datamodule=data)
    return trainer


def sampling(**arguments) -> FewStepSampling:
    return FewStepSampling(**{"steps": [1, 2], "every_n_steps": 2, **arguments})


def history(run, name: str) -> ScoreHistory:
    return ScoreHistory.read(run / name / "scores.jsonl", "test")


# -- prompts alone ----------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_without_verdict_score_or_figure_of_scores(shards, tmp_path, capsys):
    bar = ExperimentProgressBar(refresh_rate=1, seconds_between_lines=0)
    run = tmp_path / "run"
    fit(run, shards, sampling(prompts=PROMPTS), bar, enable_progress_bar=True)

    out, found = capsys.readouterr().out, tiny.events(run)
    assert "step 4: 1/2 network steps drawn (3 images each" in out
    assert "score" not in out and "nan" not in out
    assert [image.step for image in found.Images("eval/prompts/pictures/contact_sheet")] == [0, 2, 4]
    assert {path.name for path in (run / "prompts").iterdir()} == {"contact_sheet.png", "results", "scores.jsonl"}
    for curve in ("1 step", "2 steps"):
        tags = tiny.events(run / curve).Tags()["scalars"]
        assert {*tags} == {f"eval/prompts/sampling/{name}" for name in ("nfe", "seconds")}
    (first, *_) = (json.loads(line) for line in (run / "prompts/scores.jsonl").read_text().splitlines())
    assert "overall" not in first
    assert (first["scores"], first["metrics"], first["images"]) == (None, {}, 3)
    rows = (run / "prompts/results/final-0000004-2step.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == PROMPTS


def test_a_file_of_prompts_draws_each_line_once(shards, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffone\n\n  two \r\none\nthree\n", encoding="utf-8")
    fit(tmp_path / "run", shards, sampling(prompts=file, at_start=False, figures=False), max_steps=1)

    rows = (tmp_path / "run/prompts/results/final-0000001-1step.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"prompts: cannot read .*no\.txt"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a\0b", "holds NUL characters"),
        (b" \n\n", "holds no prompt"),
    ],
)
def test_a_bad_file_of_prompts_is_one_sentence(tmp_path, content, said):
    file = tmp_path / "no.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        FewStepSampling(prompts=file)


@pytest.mark.parametrize("prompts", [[], ["", "  "]])
def test_a_list_without_a_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="holds no prompt"):
        FewStepSampling(prompts=prompts)


def test_without_prompts_the_captions_of_validation_samples_are_drawn(shards, tmp_path):
    fit(tmp_path / "run", shards, sampling(images_per_task=2, final_images_per_task=5, figures=False))

    drawn = {record.stage: record.images for record in history(tmp_path / "run", "validation_captions").records}
    assert drawn == {"fit": 2, "final": 5}
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
    captions = dict.fromkeys(caption for batch in data.validation_batches(images=False) for caption in batch.captions)
    rows = (tmp_path / "run/validation_captions/results/final-0000004-1step.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == [*captions][:5]


def test_without_prompts_and_validation_samples_the_remedy_is_named(shards, tmp_path):
    with pytest.raises(ValueError, match=r"prompts are not set.*no validation_shards"):
        tiny.trainer(tmp_path / "run", sampling()).fit(tiny.meanflow(), datamodule=tiny.data(shards))


# -- metrics and benchmarks -------------------------------------------------------------------------------------------


def test_distances_to_the_validation_samples_are_those_to_a_folder_of_their_images(shards, tmp_path):
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
    folder = tmp_path / "images"
    folder.mkdir()
    images = torch.cat([batch.images for batch in data.validation_batches()]).permute(0, 2, 3, 1).numpy()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    generated = list(np.random.default_rng(0).integers(0, 256, (9, 36, 36, 3), np.uint8))
    features = RandomFeatures(width=16)
    for kind, settings in ((FrechetDistance, {}), (KernelDistance, {"subset_size": 9})):
        of_folder, of_shards = kind(features, folder, **settings), kind(features, **settings)
        of_shards.use_data(data)
        scores = []
        for metric in (of_folder, of_shards, of_shards.fresh_copy()):
            metric.update(generated, [""] * 9)
            scores.append(float(metric.compute()["score"]))
        assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)
    kept = sorted(path.name.rpartition("-")[0] for path in shards.with_name(f"{shards.name}-statistics").iterdir())
    assert kept == ["validation-features", "validation-moments"]


def test_statistics_of_validation_samples_are_read_again_and_depend_on_their_number(shards, monkeypatch):
    def score(samples: int) -> float:
        metric = FrechetDistance(RandomFeatures(width=8))
        metric.use_data(tiny.data(shards, validation_shards=str(shards), validation_samples=samples))
        metric.update(list(np.zeros((4, 36, 36, 3), np.uint8)), [""] * 4)
        return float(metric.compute()["score"])

    first, other = score(20), score(30)
    assert first != other
    monkeypatch.setattr("emf_lightning.data.datamodule.CaptionImageData.validation_batches", None)  # no second reading
    assert (score(20), score(30)) == (first, other)


def test_statistics_of_validation_pictures_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    def score(**settings) -> float:
        metric = FrechetDistance(RandomFeatures(width=8))
        metric.use_data(tiny.data(tmp_path / "set", **{"validation_share": 0.3} | settings))
        metric.update(list(np.zeros((4, 36, 36, 3), np.uint8)), [""] * 4)
        return float(metric.compute()["score"])

    def kept() -> int:
        return len(list((tmp_path / "set-statistics").iterdir()))

    imagefolder(tmp_path / "set", jsonl)
    first = score()
    with monkeypatch.context() as patch:
        patch.setattr("emf_lightning.data.datamodule.CaptionImageData.validation_batches", None)  # no second reading
        assert score() == first
    assert kept() == 1
    stream = tiny.data(tmp_path / "set", validation_share=0.3).validation_stream()
    held_out = next(name for name in (f"{n:03d}" for n in range(9)) if stream.wanted(name))
    rest = next(name for name in (f"{n:03d}" for n in range(9)) if not stream.wanted(name))
    (tmp_path / f"set/{rest}.png").write_bytes(noise_image(99))  # of the training
    assert score() == first and kept() == 1
    (tmp_path / f"set/{held_out}.png").write_bytes(noise_image(99))
    assert score() != first and kept() == 2
    text = (tmp_path / "set/metadata.jsonl").read_text()
    (tmp_path / "set/metadata.jsonl").write_text(text.replace(f'"{held_out}.png"', f'"{rest}.png"'))
    score()
    assert kept() == 3, "another caption, or none, decides which pictures are used"
    score(validation_share=0.4)
    assert kept() == 4


def test_a_distance_without_reference_outside_a_run_names_the_remedy():
    with pytest.raises(ValueError, match=r"KernelDistance: reference is not set; give a folder"):
        KernelDistance().check_count(10)


def test_metrics_of_prompts_have_curves_figures_monitors_and_a_table(shards, tmp_path, capsys):
    bar = ExperimentProgressBar(refresh_rate=1, seconds_between_lines=0)
    run, tag = tmp_path / "run", "eval/prompts/kid_random/2step"
    saver = ModelCheckpoint(run / "best", "{step}", monitor=tag, every_n_train_steps=2)
    callback = sampling(prompts=PROMPTS, at_start=False, extra_metrics=[KernelDistance(), FrechetDistance()])
    trainer = fit(run, shards, callback, saver, bar, enable_progress_bar=True, enable_checkpointing=True)

    records, out = history(run, "prompts").records, capsys.readouterr().out
    values = [r.metrics["kid_random"].score for r in records if r.sampling.steps == 2]
    assert [
        event.value for event in tiny.events(run / "2 steps").Scalars("eval/prompts/parts/kid_random")
    ] == pytest.approx(values)
    assert float(trainer.callback_metrics[tag]) == pytest.approx(values[-1])
    assert saver.best_model_score is not None
    assert all(record.metrics["kid_random"].higher_is_better is False for record in records)
    assert {"training_curves.png", "step_counts.png"} <= {path.name for path in (run / "prompts").iterdir()}
    assert "KID x 1000 (random features), lower is better" in out
    assert "overall" not in out
    main(["report", str(run), "--out", str(tmp_path / "out")])
    rows = Report.read(tmp_path / "out/report.json").rows
    assert {(row.metric, row.benchmark) for row in rows} == {("kid_random", "prompts"), ("fid_random", "prompts")}
    assert (tmp_path / "out/training-prompts-kid_random.png").is_file()
    assert "overall" not in (tmp_path / "out/report.md").read_text()


def test_any_benchmark_is_sampled_by_task_and_several_at_once(shards, tmp_path):
    run = tmp_path / "run"
    suite = ShapesSuite(per_task=2, scenes_per_task=1)
    callback = sampling(
        suite=suite, benchmarks=[Brightness()], prompts=["mine"], at_start=False, final_images_per_task=3
    )
    fit(run, shards, callback, max_steps=2)

    assert {path.name for path in run.iterdir() if (path / "scores.jsonl").is_file()} == {
        "shapes",
        "brightness",
        "prompts",
    }
    record = history(run, "brightness").latest()[-1]
    assert record.images == 6
    assert record.metrics["brightness"].parts.keys() == {"odd", "even"}
    assert record.overall == record.metrics["brightness"].score
    tags = tiny.events(run / "1 step").Tags()["scalars"]
    assert {"eval/brightness/overall", "eval/brightness/parts/odd", "eval/shapes/overall"} <= {*tags}
    state = FewStepSampling(suite=suite).state_key
    assert state == "FewStepSampling{'suite': 'shapes'}", "checkpoints of earlier versions keep their curves"


def test_losses_are_the_same_with_prompts_metrics_and_parent(shards, tmp_path):
    losses = []
    for name in ("without", "with"):
        settings = {"parent_steps": 3, "images_per_task": 2, "final_images_per_task": 3}
        callbacks = [sampling(extra_metrics=[KernelDistance()], **settings)] if name == "with" else []
        torch.manual_seed(5)
        data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
        trainer = tiny.trainer(tmp_path / name, *callbacks, limit_val_batches=0)
        model = tiny.meanflow()
        trainer.fit(model, datamodule=data)
        losses.append([weight.clone() for weight in model.state_dict().values()])
    assert all(map(torch.equal, *losses))


def test_the_parents_images_stay_those_of_the_first_step(shards, tmp_path):
    run = tmp_path / "run"
    fit(run, shards, sampling(prompts=["a", "b"], parent_steps=3), max_steps=2)
    with np.load(run / "prompts/parent.npz") as kept:
        assert str(kept["heading"]) == "parent, 3 steps"
        before = kept["images"]
    assert before.shape == (2, 36, 36, 3)
    assert (run / "prompts/contact_sheet.png").is_file()


def test_the_parents_images_are_the_teachers_where_the_network_starts_further_on(shards, tmp_path):
    fit(tmp_path / "run", shards, sampling(prompts=["a", "b"], parent_steps=3), max_steps=2)
    torch.manual_seed(5)
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
    module = JointDistillation(tiny.network())
    torch.nn.init.ones_(module.net.transformer.proj_out.bias)  # as init_from does
    callback, settings = (
        sampling(prompts=["a", "b"], parent_steps=3),
        {"limit_val_batches": 0, "gradient_clip_val": None},
    )
    tiny.trainer(tmp_path / "joint", callback, max_steps=2, **settings).fit(module, datamodule=data)
    parents = [np.load(tmp_path / name / "prompts/parent.npz")["images"] for name in ("run", "joint")]
    assert np.array_equal(*parents)


def test_emf_test_scores_prompts_by_metrics_alone(shards, tmp_path):
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=24)
    for name, arguments in (("file", {"prompts": PROMPTS}), ("captions", {})):
        sweep = StepSweep(extra_metrics=[FrechetDistance()], steps=[1, 2], images_per_prompt=2, **arguments)
        tiny.trainer(tmp_path / name, sweep).test(tiny.meanflow(), datamodule=data, verbose=False)
        rows = Report.read(tmp_path / name / "report.json").rows
        assert [(row.metric, row.steps) for row in rows] == [("fid_random", 1), ("fid_random", 2)]
        assert all(math.isfinite(row.scores["score"]) for row in rows)


def test_two_sets_of_prompts_need_two_names():
    with pytest.raises(ValueError, match="benchmarks of one name"):
        FewStepSampling(benchmarks=[OwnPrompts(["a"])], prompts=["b"])
    assert len(FewStepSampling(benchmarks=[OwnPrompts(["a"], "first")], prompts=["b"]).benchmarks) == 2


def test_a_report_of_prompts_alone_says_that_there_is_nothing_to_tabulate(shards, tmp_path, capsys):
    fit(tmp_path / "run", shards, sampling(prompts=["a"], figures=False), max_steps=1)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "drew prompts without any metric" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_images_are_scored_in_full_precision_whatever_the_trainer_has(shards, tmp_path, stage):
    dtypes = set()

    class Product(Brightness):
        """Notes the dtype of a product of matrices, which autocast would change."""

        def values(self, images, prompts):
            dtypes.add((torch.eye(2) @ torch.eye(2)).dtype)
            return super().values(images, prompts)

    if stage == "fit":
        fit(tmp_path, shards, sampling(benchmarks=[Product()]), precision="bf16-mixed")
    else:
        sweep = StepSweep(benchmarks=[Product()], steps=[1], images_per_prompt=1)
        trainer = tiny.trainer(tmp_path, sweep, precision="bf16-mixed")
        trainer.test(tiny.meanflow(), datamodule=tiny.data(shards, validation_shards=str(shards)), verbose=False)
    assert dtypes == {torch.float32}


def test_a_distance_of_another_number_of_images_is_refused_before_training(shards, tmp_path):
    distance = FrechetDistance(RandomFeatures(), count=50_000)
    with pytest.raises(ValueError, match="images, but count is 50,000"):
        fit(tmp_path, shards, sampling(prompts=PROMPTS, extra_metrics=[distance]))
