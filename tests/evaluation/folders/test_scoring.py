from __future__ import annotations

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from emf_lightning.data.reading.pixels import ImageLimits
from emf_lightning.evaluation.distances.diversity import PromptDiversity, VendiScore
from emf_lightning.evaluation.distances.fid_kid import FrechetDistance, KernelDistance
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.folders.image_folder import GeneratedImage, generated_images
from emf_lightning.evaluation.folders.scoring import score_images
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.geneval.task_scores import TaskScores
from tests.evaluation.folders.test_image_folder import PROMPTS, SUITE, write_listed


class KilledError(Exception):
    """Stops a scoring in the middle."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images a prompt; every third is another prompt's."""
    folder = tmp_path_factory.mktemp("images")
    write_listed(folder, per_prompt=2)
    files = sorted(folder.glob("*.png"))
    for file, other in zip(files[::3], files[3::3], strict=False):
        file.write_bytes(other.read_bytes())
    return folder


def kill_at_20(done, total):
    if done >= 20:
        raise KilledError


def run(folder, out, **arguments):
    metric = SuiteScore(SUITE)
    return score_images(generated_images(folder, metric), metric, out, **{"batch_size": 4, **arguments})


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_scores_and_lines_agree_with_evaluating_image_by_image(folder, tmp_path):
    found = run(folder, tmp_path)
    by_text = {prompt.prompt: prompt for prompt in PROMPTS}
    evaluated = []
    for image in generated_images(folder, SuiteScore(SUITE)):
        prompt = by_text[image.prompt]
        evaluated.append((prompt, SUITE.evaluate(np.array(Image.open(image.path)), prompt)))
    expected = TaskScores.of(evaluated)

    assert found["scores"]["score"] == pytest.approx(expected.overall)
    assert {task: found["scores"][task] for task in expected.correct} == pytest.approx(expected.correct)
    assert 0.3 < found["scores"]["score"] < 1
    assert [row["correct"] for row in rows(tmp_path)] == [verdict.correct for _, verdict in evaluated]
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == found["scores"]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "results.jsonl"}


def test_the_lines_are_what_genevals_summary_reads(folder, tmp_path):
    found = run(folder, tmp_path)["scores"]
    # as the official summary_scores.py: images, prompts by their metadata, tasks in the order of their first line
    images, prompts, tasks = [], {}, {}
    for row in rows(tmp_path):
        assert isinstance(row["correct"], bool) and isinstance(row["metadata"], str)
        images.append(row["correct"])
        prompts[row["metadata"]] = prompts.get(row["metadata"], False) or row["correct"]
        tasks.setdefault(row["tag"], []).append(row["correct"])
    shares = {task: sum(correct) / len(correct) for task, correct in tasks.items()}

    assert len(images) == 2 * len(prompts) == 2 * len(PROMPTS)
    assert list(shares) == list(dict.fromkeys(prompt.tag for prompt in PROMPTS))
    assert {task: found[task] for task in shares} == pytest.approx(shares)
    assert found["score"] == pytest.approx(sum(shares.values()) / len(shares))
    assert 0.3 < sum(images) / len(images) < sum(prompts.values()) / len(prompts)


def test_a_killed_run_goes_on_where_it_was_saved_and_counts_nothing_twice(folder, tmp_path):
    whole = run(folder, tmp_path / "whole")

    with pytest.raises(KilledError):
        run(folder, tmp_path / "killed", save_seconds=0, report=kill_at_20)
    seen = []
    resumed = run(folder, tmp_path / "killed", report=lambda done, total: seen.append(done))

    assert seen[0] == 20
    assert resumed["scores"] == whole["scores"]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_lines_behind_the_last_save_are_written_again(folder, tmp_path):
    with pytest.raises(KilledError):
        run(folder, tmp_path, save_seconds=1e9, report=kill_at_20)
    assert sum(1 for _ in next(tmp_path.glob(".results*")).open()) == 20
    run(folder, tmp_path)
    assert len(rows(tmp_path)) == 2 * len(PROMPTS)


def test_a_kill_while_saving_leaves_the_save_before(folder, tmp_path):
    with pytest.raises(KilledError):
        run(folder, tmp_path, save_seconds=0, report=kill_at_20)
    (tmp_path / ".progress-0-of-1.pt.partial").write_bytes(b"half a file")
    seen = []
    run(folder, tmp_path, report=lambda done, total: seen.append(done))
    assert seen[0] == 20
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "results.jsonl"}


@pytest.mark.parametrize("at", ["results.jsonl", "scores.json"])
def test_a_kill_while_the_scores_are_written_loses_nothing(folder, tmp_path, monkeypatch, at):
    replace = os.replace

    def kill(source, target):
        if Path(target).name == at:
            raise KilledError
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KilledError):
        run(folder, tmp_path)
    monkeypatch.undo()
    seen = []
    run(folder, tmp_path, report=lambda done, total: seen.append(done))
    assert seen == [2 * len(PROMPTS)]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "results.jsonl"}


def test_images_that_cannot_be_used_are_left_out_by_reason_and_the_others_are_scored(folder, tmp_path):
    images = generated_images(folder, SuiteScore(SUITE))
    whole = BytesIO()
    Image.new("RGB", (36, 36), "red").save(whole, "JPEG")
    (tmp_path / "broken.jpg").write_bytes(whole.getvalue()[:-40])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (1, 3000)).save(tmp_path / "line.png")
    bad = [
        GeneratedImage(tmp_path / name, images[9].prompt) for name in ("broken.jpg", "empty.png", "line.png", "no.gif")
    ]
    bad.append(GeneratedImage(images[0].path, "", "missing caption"))
    listed = [*images[:9], *bad, *images[9:]]
    scores = score_images(listed, SuiteScore(SUITE), tmp_path / "out", batch_size=4)
    assert scores["left_out"] == {
        "corrupt image": [str(tmp_path / "broken.jpg"), str(tmp_path / "empty.png")],
        "image with an aspect ratio above 32": [str(tmp_path / "line.png")],
        "unreadable image file (No such file or directory)": [str(tmp_path / "no.gif")],
        "missing caption": [str(images[0].path)],
    }
    alone = score_images(images, SuiteScore(SUITE), tmp_path / "alone", batch_size=4)
    assert (scores["scores"], scores["images"]) == (alone["scores"], len(images))
    assert (tmp_path / "out/results.jsonl").read_text() == (tmp_path / "alone/results.jsonl").read_text()
    with pytest.raises(ValueError, match=r"folder: none of 5 images .*2 x corrupt image \(.*broken\.jpg first"):
        score_images(bad, SuiteScore(SUITE), tmp_path / "none")


def test_a_metric_that_keeps_features_resumes_too(folder, tmp_path):
    features = RandomFeatures(width=8)

    def metric():
        return KernelDistance(features, folder, subsets=3, subset_size=16)

    def kill(done, total):
        if done >= 12:
            raise KilledError

    images = generated_images(folder, metric())
    whole = score_images(images, metric(), tmp_path / "whole", batch_size=4)
    with pytest.raises(KilledError):
        score_images(images, metric(), tmp_path / "killed", batch_size=4, save_seconds=0, report=kill)
    assert score_images(images, metric(), tmp_path / "killed", batch_size=4)["scores"] == whole["scores"]


def test_the_beginnings_of_something_else_are_refused(folder, tmp_path):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, save_seconds=0, report=stop)
    metric = SuiteScore(SUITE)
    with pytest.raises(ValueError, match=r"holds the beginnings of other images, of images that have been replaced"):
        score_images(generated_images(folder, metric)[:10], metric, tmp_path)
    with pytest.raises(ValueError, match=r"was begun by 1 processes, this is one of 2"):
        score_images(generated_images(folder, metric), SuiteScore(SUITE), tmp_path, rank=1, ranks=2)


@pytest.mark.parametrize("change", ["an image", "the limits"])
def test_images_replaced_since_and_other_limits_are_refused(tmp_path, change):
    (tmp_path / "images").mkdir()
    write_listed(tmp_path / "images", per_prompt=2)
    with pytest.raises(KilledError):
        run(tmp_path / "images", tmp_path / "out", save_seconds=0, report=kill_at_20)
    if change == "an image":
        file = min((tmp_path / "images").glob("*.png"))
        file.write_bytes(max((tmp_path / "images").glob("*.png")).read_bytes())
    limits = ImageLimits() if change == "an image" else ImageLimits(max_pixels=100_000)
    with pytest.raises(ValueError, match="images that have been replaced since"):
        run(tmp_path / "images", tmp_path / "out", limits=limits)


def _worker(number: int, folder: str, out: str, port_file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=number, world_size=2)
    torch.set_num_threads(1)
    found = run(Path(folder), Path(out), rank=number, ranks=2)
    (Path(out) / f"of-{number}.json").write_text(json.dumps(found["scores"]))
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(folder, tmp_path):
    alone = run(folder, tmp_path / "alone")
    mp.start_processes(
        _worker, (str(folder), str(tmp_path / "two"), str(tmp_path / "port")), nprocs=2, start_method="fork"
    )
    both = [json.loads((tmp_path / f"two/of-{number}.json").read_text()) for number in range(2)]

    assert both[0] == both[1] == alone["scores"]
    assert rows(tmp_path / "two") == rows(tmp_path / "alone")


def _distances(folder, out, **ranks) -> list[dict]:
    """FID and KID of the folder's first half against its second."""
    features = RandomFeatures(width=8)
    found = []
    for metric in (
        FrechetDistance(features, folder / "reference"),
        KernelDistance(features, folder / "reference", subsets=3, subset_size=7),
    ):
        images = generated_images(folder / "generated", metric)
        found.append(score_images(images, metric, out / metric.name, **ranks, batch_size=4)["scores"])
    return found


def _distance_worker(number: int, folder: str, out: str, port_file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=number, world_size=2)
    torch.set_num_threads(1)
    (Path(out) / f"of-{number}.json").write_text(json.dumps(_distances(Path(folder), Path(out), rank=number, ranks=2)))
    dist.destroy_process_group()


def test_two_processes_find_the_distances_that_one_finds(folder, tmp_path):
    for part, first in (("generated", 0), ("reference", 1)):
        (tmp_path / part).mkdir()
        for file in sorted(folder.glob("*.png"))[first::2]:
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    alone = _distances(tmp_path, tmp_path / "alone")
    shutil.rmtree(tmp_path / "reference-statistics")  # two processes describe the reference anew
    (tmp_path / "two").mkdir()
    mp.start_processes(
        _distance_worker, (str(tmp_path), str(tmp_path / "two"), str(tmp_path / "port")), nprocs=2, start_method="fork"
    )
    both = [json.loads((tmp_path / f"two/of-{number}.json").read_text()) for number in range(2)]

    assert both[0] == both[1]
    assert len(list((tmp_path / "reference-statistics").iterdir())) == 2
    for found, expected in zip(both[0], alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_memory_holds_a_batch_and_no_more(folder, tmp_path, monkeypatch):
    from emf_lightning.evaluation.folders import scoring

    alive = []

    class Metric(SuiteScore):
        def update(self, images, prompts):
            alive.append(len(images))
            super().update(images, prompts)

    metric = Metric(SUITE)
    images = generated_images(folder, metric)
    scoring.score_images(images, metric, tmp_path, batch_size=5)
    assert max(alive) == 5
    assert sum(alive) == len(images)
    assert sum(tensor.numel() for name in metric._defaults for tensor in [getattr(metric, name)]) == 3 * len(PROMPTS)


def _one_worker(number: int, out: str, port_file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=number, world_size=2)
    torch.set_num_threads(1)
    found = []
    for kind in (PromptDiversity, VendiScore):
        metric = kind(RandomFeatures(width=8))
        if number == 1:
            metric.update(list(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)), ["a", "b"] * 3)
        found.append(float(metric.compute()["score"]))
        metric.reset()
        assert metric.features == []
    (Path(out) / f"of-{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_a_process_without_an_image_takes_part_in_every_score(tmp_path):
    mp.start_processes(_one_worker, (str(tmp_path), str(tmp_path / "port")), nprocs=2, start_method="fork")
    both = [json.loads((tmp_path / f"of-{number}.json").read_text()) for number in range(2)]
    assert both[0] == both[1]
    assert min(both[0]) > 0
