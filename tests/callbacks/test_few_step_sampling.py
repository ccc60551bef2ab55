from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from PIL import Image

from emf_lightning.callbacks import FewStepSampling
from emf_lightning.data.geneval_prompts import TASKS, Prompt
from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.evaluation.distances.fid_kid import FrechetDistance
from emf_lightning.evaluation.distances.image_features import RandomFeatures
from emf_lightning.evaluation.fixed_noise import fixed_noise
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.modules.flow_map import FlowMapModule
from tests.callbacks import tiny
from tests.callbacks.oracle import NoiseKeeper, Oracle, Twice

SUITE = ShapesSuite(per_task=6, scenes_per_task=6)


def sampling(**arguments) -> FewStepSampling:
    """Two images a task at one and two steps, before and after training only."""
    small = {"steps": [1, 2], "every_n_steps": 100, "images_per_task": 2, "final_images_per_task": 2}
    return FewStepSampling(**{"suite": SUITE, "shown_per_task": 1, "figures": False, **small, **arguments})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    """The directory of a run of four steps, evaluated at 2 and 4, with a checkpoint at 2."""
    run = tmp_path_factory.mktemp("run") / "first"
    saver = ModelCheckpoint(run / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=2)
    trainer = tiny.trainer(
        run, sampling(every_n_steps=2, figures=True, at_start=False), saver, enable_checkpointing=True
    )
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards))
    return run


def scores(run) -> list[dict]:
    return [json.loads(line) for line in (run / "shapes" / "scores.jsonl").read_text().splitlines()]


def overall(model, data, tmp_path, **arguments) -> dict[int, dict]:
    """Step count -> the final record of ``model`` after one training step."""
    callback = sampling(steps=[1, 4], at_start=False, **arguments)
    tiny.trainer(tmp_path / "run", callback, max_steps=1).fit(model, datamodule=data)
    return {record["steps"]: record for record in scores(tmp_path / "run")}


def another_of_its_task(prompt: Prompt) -> Prompt:
    task = [other for other in SUITE.prompts() if other.tag == prompt.tag]
    return task[(task.index(prompt) + 1) % len(task)]


# -- the score of known models ----------------------------------------------------------------------------------------


def test_a_model_that_generates_its_prompt_scores_the_ceiling(shards, tmp_path):
    records = overall(Oracle(SUITE, lambda prompt: prompt), tiny.data(shards), tmp_path, final_images_per_task=6)

    assert records.keys() == {1, 4}
    assert all(record["overall"] == SUITE.ceiling().overall == 1 for record in records.values())
    assert all(record["scores"]["images"] == dict.fromkeys(TASKS, 6) for record in records.values())


def test_a_model_that_generates_another_prompt_scores_chance(shards, tmp_path):
    records = overall(Oracle(SUITE, another_of_its_task), tiny.data(shards), tmp_path, final_images_per_task=6)

    assert all(abs(record["overall"] - SUITE.chance().overall) < 0.05 for record in records.values())


def test_a_model_that_generates_every_second_prompt_scores_one_half(shards, tmp_path):
    odd = SUITE.prompts()[1::2]
    model = Oracle(SUITE, lambda prompt: prompt if prompt in odd else None)
    # as many images a task as it has prompts, so that the share is known exactly
    records = overall(model, tiny.data(shards), tmp_path, final_images_per_task=30)

    shares = records[1]["scores"]["correct"]
    for task in TASKS:
        prompts = [prompt for prompt in SUITE.prompts() if prompt.tag == task]
        images = [prompts[i % len(prompts)] in odd for i in range(30)]
        assert shares[task] == pytest.approx(np.mean(images))


def test_further_metrics_see_the_same_images_and_have_curves_of_their_own(shards, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    for number, prompt in enumerate(SUITE.prompts()):
        scene = scene_for(SUITE.world, prompt, np.random.default_rng(number))
        Image.fromarray(scene.render(SUITE.world)).save(reference / f"{number}.png")
    fid = FrechetDistance(RandomFeatures(width=8), reference)
    distances = {}
    for name, answer in (("oracle", lambda prompt: prompt), ("blank", lambda prompt: None)):
        model = Oracle(SUITE, answer)
        callback = sampling(steps=[1], at_start=False, final_images_per_task=6, extra_metrics=[fid])
        tiny.trainer(tmp_path / name, callback, max_steps=1).fit(model, datamodule=tiny.data(shards))
        (record,) = scores(tmp_path / name)
        distances[name] = record["metrics"]["fid_random"]["values"]["score"]
        curve = tiny.events(tmp_path / name / "1 step").Scalars("eval/shapes/parts/fid_random")
        assert curve[-1].value == pytest.approx(distances[name], rel=1e-5)
    assert distances["oracle"] < 0.2 * distances["blank"]


# -- training is the same ---------------------------------------------------------------------------------------------


class Recorder(FlowMapModule):
    """Keeps its losses, and of every call of ``sample`` the noise and a weight."""

    def __init__(self) -> None:
        super().__init__(tiny.network())
        self.losses: list[float] = []
        self.calls: list[tuple[int, torch.Tensor]] = []
        self.weights: list[torch.Tensor] = []
        self.fails = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def sample_latents(self, text, null, noise, steps, guidance_scale=None):
        self.calls.append((steps, noise.clone()))
        self.weights.append(next(self.net.parameters()).detach().clone())
        assert not any(part.training for part in self.net.modules())
        torch.rand(3), np.random.rand()  # noqa: NPY002  a sampler may draw numbers of its own
        if self.fails:
            raise RuntimeError("sampling failed")
        return super().sample_latents(text, null, noise, steps, guidance_scale)


def fit(shards, run, *callbacks, **arguments) -> Recorder:
    torch.manual_seed(5)
    model = Recorder()
    tiny.trainer(run, *callbacks, **arguments).fit(model, datamodule=tiny.data(shards))
    return model


def test_losses_and_weights_are_the_same_with_and_without_the_callback(shards, tmp_path):
    without = fit(shards, tmp_path / "without", EMAWeightAveraging(decay=0.5))
    watched = fit(shards, tmp_path / "with", EMAWeightAveraging(decay=0.5), sampling(every_n_steps=1))

    assert len(watched.calls) == 10, "not sampled at 0, 1, 2, 3 and 4 with two step counts"
    assert len(without.losses) == 4
    assert watched.losses == without.losses
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name


def test_images_are_sampled_with_the_averaged_weights(shards, tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    model = fit(shards, tmp_path / "run", average, sampling(every_n_steps=2, at_start=False, steps=[1]), max_steps=3)
    plain = fit(shards, tmp_path / "plain", sampling(every_n_steps=2, at_start=False, steps=[1]), max_steps=3)

    assert model.losses == plain.losses
    at_step_2, at_the_end = model.weights
    assert not torch.equal(at_step_2, plain.weights[0])
    assert torch.equal(at_the_end, next(average._average_model.module.net.parameters()))


def test_live_weights_modes_and_random_states_come_back_when_sampling_raises(shards, tmp_path):
    checked = []

    class Tolerant(FewStepSampling):
        def _evaluate(self, trainer, module, stage):
            weight, random = next(module.net.parameters()).detach().clone(), torch.get_rng_state()
            module.fails = True
            with pytest.raises(RuntimeError, match="sampling failed"):
                super()._evaluate(trainer, module, stage)
            assert not torch.equal(module.weights[-1], weight), "the averages were not used"
            assert torch.equal(next(module.net.parameters()), weight)
            assert torch.equal(torch.get_rng_state(), random)
            assert module.net.training
            checked.append(stage)

    callback = Tolerant(SUITE, every_n_steps=2, at_start=False, images_per_task=1, figures=False)
    # listed before the averaging, it runs at the end before the averages are copied into the weights
    fit(shards, tmp_path / "run", callback, EMAWeightAveraging(decay=0.5), max_steps=3)
    assert checked == ["fit", "final"]


def test_noise_is_the_same_at_every_step_count_batch_size_and_checkpoint(shards, tmp_path):
    small = fit(shards, tmp_path / "small", sampling(batch_size=5), max_steps=1).calls
    large = fit(shards, tmp_path / "large", sampling(batch_size=64), max_steps=1).calls

    def joined(calls, steps: int) -> torch.Tensor:
        return torch.cat([noise for count, noise in calls if count == steps])

    at_start, at_end = joined(large, 1).chunk(2)
    assert len(at_start) == 12
    assert torch.equal(at_start, at_end)
    assert torch.equal(joined(large, 1), joined(large, 2))
    assert torch.equal(joined(large, 1), joined(small, 1))
    assert len(at_start.flatten(1).unique(dim=0)) == 12


# -- when -------------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_do_not_make_it_run_twice(shards, tmp_path):
    fit(shards, tmp_path / "run", sampling(every_n_steps=1, steps=[1]), accumulate_grad_batches=2, max_steps=3)

    assert [(record["stage"], record["step"]) for record in scores(tmp_path / "run")] == [
        ("fit", 0),
        ("fit", 1),
        ("fit", 2),
        ("final", 3),
    ]


def test_further_guidance_scales_are_sampled_at_the_end_with_labels_of_their_own(shards, tmp_path):
    fit(shards, tmp_path / "run", sampling(steps=[1], guidance_scale=[1.0, 2.0]), max_steps=1)

    found = [(record["stage"], record["label"], record["nfe"]) for record in scores(tmp_path / "run")]
    assert found == [("fit", "1step", 1), ("final", "1step", 1), ("final", "1step_cfg2", 2)]


# -- validate, and several ranks --------------------------------------------------------------------------------------


def validate(run, shards, **arguments) -> list[dict]:
    odd = SUITE.prompts()[1::2]
    model = Oracle(SUITE, lambda prompt: prompt if prompt in odd else None)
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=16)
    callback = sampling(steps=[2], final_images_per_task=7, batch_size=4)
    tiny.trainer(run, callback, **arguments).validate(model, datamodule=data, verbose=False)
    (record,) = scores(run)
    assert (record["stage"], record["scores"]["images"]) == ("validate", dict.fromkeys(TASKS, 7))
    return [json.loads(line) for line in (run / "shapes/results/validate-0000000-2step.jsonl").read_text().splitlines()]


def test_two_ranks_share_the_images_and_find_what_one_finds(shards, tmp_path):
    alone = validate(tmp_path / "alone", shards)
    together = validate(tmp_path / "together", shards, devices=2, strategy="ddp_fork")

    assert len(alone) == 42
    # the oracle places objects at random; whether an image shows its prompt is fixed
    found = [[row | {"details": None} for row in rows] for rows in (alone, together)]
    assert found[0] == found[1]
    first, second = (scores(tmp_path / run)[0] for run in ("alone", "together"))
    assert second["scores"] == first["scores"]
    assert second["overall"] > 0


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_scores_of_a_checkpoint_bear_its_step(run, shards, tmp_path, stage):
    data = tiny.data(shards, validation_shards=str(shards), validation_samples=16)
    trainer = tiny.trainer(tmp_path / "run", sampling(steps=[1]))
    checkpoint = next((run / "checkpoints").glob("step=2*.ckpt"))
    getattr(trainer, stage)(tiny.meanflow(), datamodule=data, ckpt_path=checkpoint, verbose=False)

    assert [(r["stage"], r["step"]) for r in scores(tmp_path / "run")][-1] == (stage, 2)
    assert trainer.callback_metrics["eval/shapes/overall/1step"] == scores(tmp_path / "run")[-1]["overall"]


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_each_step_count_and_level_is_a_run_of_its_own_in_tensorboard_with_the_same_tags(run):
    names = ["overall", *(f"parts/{name}" for name in (*TASKS, "strict", "se")), "sampling/nfe", "sampling/seconds"]
    for steps, curve in ((1, "1 step"), (2, "2 steps")):
        found = tiny.events(run / curve)
        for name in names:
            assert [event.step for event in found.Scalars(f"eval/shapes/{name}")] == [2, 4], name
        assert [event.value for event in found.Scalars("eval/shapes/sampling/nfe")] == [steps, steps]
        assert min(tag for tag in found.Tags()["scalars"]) == "eval/shapes/overall"
    for name in ("overall", *(f"parts/{task}" for task in TASKS)):
        ceiling, chance = (tiny.events(run / level).Scalars(f"eval/shapes/{name}") for level in ("ceiling", "chance"))
        assert [event.step for event in ceiling] == [event.step for event in chance] == [2, 4]
        assert ceiling[-1].value == 1 and chance[-1].value < 0.5
    assert not [tag for tag in tiny.events(run).Tags()["scalars"] if tag.startswith("eval")]


def test_figures_are_in_tensorboard_and_on_disk(run):
    found = tiny.events(run)
    for name, steps in (("contact_sheet", [2, 4]), ("step_counts", [2, 4]), ("training_curves", [4])):
        assert [image.step for image in found.Images(f"eval/shapes/pictures/{name}")] == steps
        image = np.asarray(Image.open(run / "shapes" / f"{name}.png"))
        assert image.std() > 1, f"{name} is empty"


def test_every_evaluated_image_has_a_line_that_genevals_summary_reads(run):
    files = sorted((run / "shapes" / "results").iterdir())
    assert [file.name for file in files] == [
        f"{stage}-{step:07d}-{label}.jsonl"
        for stage, step in (("final", 4), ("fit", 2))
        for label in ("1step", "2step")
    ]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    texts = [prompt.prompt for prompt in SUITE.prompts()]
    assert [texts[int(row["filename"][:5])] for row in rows] == [row["prompt"] for row in rows]  # of few prompts, too
    # what the official summary_scores.py does: shares by tag, in order, and prompts told apart by their metadata
    by_tag: dict[str, list[bool]] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["correct"])
        assert json.loads(row["metadata"])["prompt"] == row["prompt"]
        assert row["correct"] == (row["reason"] == "")
    assert {tag: len(values) for tag, values in by_tag.items()} == dict.fromkeys(TASKS, 2)
    record = next(r for r in scores(run) if (r["stage"], r["label"]) == ("final", "1step"))
    assert np.mean([np.mean(values) for values in by_tag.values()]) == pytest.approx(record["overall"])
    assert len({row["filename"] for row in rows}) == len(rows)


# -- resuming ---------------------------------------------------------------------------------------------------------


def resume(run, shards, directory):
    saver = ModelCheckpoint(directory / "checkpoints", every_n_train_steps=100)
    trainer = tiny.trainer(directory, sampling(every_n_steps=2), saver, enable_checkpointing=True)
    checkpoint = next((run / "checkpoints").glob("step=2*.ckpt"))
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(shards), ckpt_path=checkpoint)


def test_a_run_resumed_elsewhere_has_the_whole_curves(run, shards, tmp_path):
    resume(run, shards, tmp_path / "second")

    kept = ("stage", "step", "label", "overall")
    first, second = ([{k: r[k] for k in kept} for r in scores(where)] for where in (run, tmp_path / "second"))
    assert second == first
    found = tiny.events(tmp_path / "second" / "1 step")
    assert [event.step for event in found.Scalars("eval/shapes/overall")] == [2, 4]


def test_a_run_resumed_in_its_own_directory_repeats_no_line(run, shards):
    before = scores(run)
    resume(run, shards, run)

    assert [r["scores"] for r in scores(run)] == [r["scores"] for r in before]
    assert [(r["stage"], r["step"]) for r in scores(run)] == [(r["stage"], r["step"]) for r in before]
    for curve in ("1 step", "2 steps", "ceiling", "chance"):
        assert [event.step for event in tiny.events(run / curve).Scalars("eval/shapes/overall")] == [2, 4], curve


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[], [1, 1], [0, 2]])
def test_senseless_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be different whole numbers"):
        sampling(steps=steps)


def test_a_missing_reference_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"reference: cannot read .*nowhere.*give the scores.jsonl"):
        sampling(reference=tmp_path / "nowhere.jsonl")


def test_bare_loaders_are_refused_with_the_remedy(shards, tmp_path):
    data = tiny.data(shards)
    data.setup("fit")
    with pytest.raises(ValueError, match="hand the trainer a datamodule"):
        tiny.trainer(tmp_path / "run", sampling()).fit(tiny.meanflow(), train_dataloaders=data.train_dataloader())


def test_equal_prompts_of_a_suite_have_noises_and_files_of_their_own(shards, tmp_path):
    suite = Twice(per_task=6, scenes_per_task=6)
    texts, model = [prompt.prompt for prompt in suite.prompts()], NoiseKeeper(suite)
    callback = sampling(suite=suite, steps=[1], final_images_per_task=9, at_start=False, batch_size=5, figures=True)
    tiny.trainer(tmp_path / "run", callback, max_steps=1).fit(model, datamodule=tiny.data(shards))
    (results,) = (tmp_path / "run/shapes/results").iterdir()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert scores(tmp_path / "run")[-1]["overall"] == 1
    assert len({row["filename"] for row in rows}) == len(rows) == 9 * len(TASKS)
    several = 1 + max(int(row["filename"][-8:-4]) for row in rows)
    for row, noise in zip(rows, model.noises, strict=True):
        number, image = int(row["filename"][:5]), int(row["filename"][-8:-4])
        assert texts[number] == row["prompt"]
        occurrence = texts[:number].count(texts[number])
        assert torch.equal(noise, fixed_noise(0, texts[number], occurrence * several + image, noise.shape))
