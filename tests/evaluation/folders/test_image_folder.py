from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from emf_lightning.data.shapes.scenes import scene_for
from emf_lightning.evaluation.folders.image_files import image_files, read_image
from emf_lightning.evaluation.folders.image_folder import generated_images
from emf_lightning.evaluation.geneval.suite_score import SuiteScore
from emf_lightning.evaluation.shapes.suite import ShapesSuite

SUITE = ShapesSuite(per_task=3, scenes_per_task=3)
PROMPTS = list(SUITE.prompts())


class AnyPrompt(SuiteScore):
    """A metric without a benchmark's own prompts."""

    def prompts(self):
        return ()


class Distance(SuiteScore):
    """Of any images, whatever they show."""

    needs_prompts = False

    def __init__(self):
        super().__init__(SUITE)

    def prompts(self):
        return ()

    def prompt_of(self, path):
        return None


def scene_image(prompt, seed: int = 0) -> Image.Image:
    return Image.fromarray(scene_for(SUITE.world, prompt, np.random.default_rng(seed)).render(SUITE.world))


def write_listed(folder, per_prompt: int = 1):
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for index in range(per_prompt):
            file = f"{number:05d}-1step-{index}.png"
            scene_image(prompt, index).save(folder / file)
            rows.append({"file": file, "prompt": prompt.prompt})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_list_that_predict_writes_names_the_prompts(tmp_path):
    write_listed(tmp_path)
    images = generated_images(tmp_path, SuiteScore(SUITE))
    assert [image.prompt for image in images] == [prompt.prompt for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (SuiteScore(SUITE), r"no prompt for 1 of .*00000-2step\.png among them"),
        (Distance(), r"1 of the \d+ images are not in prompts\.jsonl, .*00000-2step\.png among them"),
    ],
)
def test_images_that_an_earlier_call_has_left_are_named(tmp_path, metric, said):
    write_listed(tmp_path)
    scene_image(PROMPTS[0]).save(tmp_path / "00000-2step.png")
    with pytest.raises(ValueError, match=said):
        generated_images(tmp_path, metric)
    assert len(generated_images(tmp_path, metric, "*-1step*")) == len(PROMPTS)


@pytest.mark.parametrize("metadata", [True, False])
def test_genevals_layout_is_known_with_and_without_its_records(tmp_path, metadata):
    for number, prompt in enumerate(PROMPTS):
        (tmp_path / f"{number:05d}/samples").mkdir(parents=True)
        scene_image(prompt).save(tmp_path / f"{number:05d}/samples/0000.png")
        if metadata:
            (tmp_path / f"{number:05d}/metadata.jsonl").write_text(json.dumps(prompt.metadata()))
    images = generated_images(tmp_path, SuiteScore(SUITE))
    assert [image.prompt for image in images] == [prompt.prompt for prompt in PROMPTS]


def test_a_text_file_beside_an_image_is_its_prompt(tmp_path):
    for number, prompt in enumerate(PROMPTS):
        scene_image(prompt).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(prompt.prompt + "\n")
    assert {image.prompt for image in generated_images(tmp_path, SuiteScore(SUITE))} == {p.prompt for p in PROMPTS}


def test_missing_images_are_counted_before_anything_is_scored(tmp_path):
    write_listed(tmp_path)
    (tmp_path / "00002-1step-0.png").unlink()
    count = len(PROMPTS)
    with pytest.raises(ValueError, match=rf"1 of the {count} images that prompts.jsonl lists are missing, 00002-1step"):
        generated_images(tmp_path, SuiteScore(SUITE))
    with pytest.raises(ValueError, match=rf"1 of the {count} images .*--partial true"):
        generated_images(tmp_path, Distance())
    assert generated_images(tmp_path, SuiteScore(SUITE), partial=True, files="00000*")
    assert len(generated_images(tmp_path, SuiteScore(SUITE), partial=True)) == len(PROMPTS) - 1
    with pytest.raises(ValueError, match=rf"{count - 1} of shapes world's {count} prompts have no image.*--partial"):
        generated_images(tmp_path, SuiteScore(SUITE), files="00000*")


def test_a_prompt_with_fewer_images_than_the_others_is_named(tmp_path):
    write_listed(tmp_path, per_prompt=2)
    (tmp_path / "prompts.jsonl").unlink()
    for number, prompt in enumerate(PROMPTS):
        for index in range(2):
            (tmp_path / f"{number:05d}-1step-{index}.txt").write_text(prompt.prompt)
    assert len(generated_images(tmp_path, SuiteScore(SUITE))) == 2 * len(PROMPTS)
    (tmp_path / "00001-1step-1.png").unlink()
    text = re.escape(repr(PROMPTS[1].prompt))
    with pytest.raises(ValueError, match=rf"1 of shapes .* fewer images than the others' 2, {text} with 1 among them"):
        generated_images(tmp_path, SuiteScore(SUITE))
    assert len(generated_images(tmp_path, SuiteScore(SUITE), partial=True)) == 2 * len(PROMPTS) - 1


def test_images_of_several_sampling_settings_are_not_one_score(tmp_path):
    settings = {"1step": (1, 1.0), "4step": (4, 1.0), "4step_cfg2": (4, 2.0), "4step_cfg2.5": (4, 2.5)}
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for label, (steps, guidance) in settings.items():
            file = f"{number:05d}-{label}.png"
            scene_image(prompt).save(tmp_path / file)
            rows.append({"file": file, "prompt": prompt.prompt, "steps": steps, "guidance": guidance})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(ValueError, match="sampled with 4 different settings of steps and guidance") as refused:
        generated_images(tmp_path, SuiteScore(SUITE))
    patterns = re.findall("'([^']*)'", str(refused.value).partition("--files")[2])
    chosen = [generated_images(tmp_path, SuiteScore(SUITE), files=pattern) for pattern in patterns]
    assert {tuple(image.path.name for image in images) for images in chosen} == {
        tuple(f"{number:05d}-{label}.png" for number in range(len(PROMPTS))) for label in settings
    }
    with pytest.raises(ValueError, match="different settings of guidance"):
        generated_images(tmp_path, Distance(), files="*-4step*")


def test_genevals_grids_are_no_images(tmp_path):
    for number, prompt in enumerate(PROMPTS):
        (tmp_path / f"{number:05d}/samples").mkdir(parents=True)
        scene_image(prompt).save(tmp_path / f"{number:05d}/samples/0000.png")
        scene_image(prompt).save(tmp_path / f"{number:05d}/grid.png")
        (tmp_path / f"{number:05d}/metadata.jsonl").write_text(json.dumps(prompt.metadata()))
    images = generated_images(tmp_path, SuiteScore(SUITE))
    assert [image.path.parent.name for image in images] == ["samples"] * len(PROMPTS)


def test_a_prompt_that_is_null_or_no_text_leaves_its_image_out(tmp_path):
    write_listed(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    for row, other in zip(rows, (None, float("nan"), 7, ["a"]), strict=False):
        row["prompt"] = other
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = generated_images(tmp_path, SuiteScore(SUITE), partial=True)
    assert [image.fault for image in images[:4]] == ["missing caption"] * 4
    assert {image.fault for image in images[4:]} == {""}
    assert {image.fault for image in generated_images(tmp_path, Distance())} == {""}  # needs no prompts
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "x" / "samples").mkdir(parents=True)
    (tmp_path / "x" / "metadata.jsonl").write_text('{"prompt": null}')
    scene_image(PROMPTS[0]).save(tmp_path / "x" / "samples" / "0.png")
    found = generated_images(tmp_path, SuiteScore(SUITE), partial=True, files="x/*")
    assert [image.fault for image in found] == ["missing caption"]


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jfif", "JPE", "tiff", "avif", "ppm", "jp2"])
def test_images_of_every_extension_are_found(tmp_path, suffix):
    form = {"jfif": "jpeg", "JPE": "jpeg", "jp2": "jpeg2000"}.get(suffix, suffix)
    for number, prompt in enumerate(PROMPTS):
        scene_image(prompt).save(tmp_path / f"{number}.{suffix}", form)
        (tmp_path / f"{number}.txt").write_text(prompt.prompt)
    assert len(generated_images(tmp_path, SuiteScore(SUITE))) == len(PROMPTS)


def test_other_prompts_and_images_without_one_are_named(tmp_path):
    write_listed(tmp_path)
    scene_image(PROMPTS[0]).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"no prompt for 1 of .*stray\.png among them; known layouts: prompts\.jsonl"):
        generated_images(tmp_path, SuiteScore(SUITE))
    (tmp_path / "stray.txt").write_text("a photo of a whale")
    with pytest.raises(ValueError, match=r"1 of .* are for prompts that shapes world does not have.*a whale"):
        generated_images(tmp_path, SuiteScore(SUITE))
    assert generated_images(tmp_path, SuiteScore(SUITE), files="*-1step-*")


def test_empty_folders_broken_lists_and_broken_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder: no folder .*nowhere"):
        generated_images(tmp_path / "nowhere", SuiteScore(SUITE))
    with pytest.raises(ValueError, match="folder: no image in"):
        generated_images(tmp_path, SuiteScore(SUITE))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is no image that can be read"):
        read_image(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"name": 1}\n')
    with pytest.raises(ValueError, match="must have `file` and `prompt` in every line"):
        generated_images(tmp_path, SuiteScore(SUITE))


def test_prompts_of_files_are_valid_text_whatever_their_bytes(tmp_path):
    for name in ("a", "b", "c"):
        scene_image(PROMPTS[0]).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n")
    rows = [{"file": "b.png", "prompt": "half \ud83d of a pair"}, {"file": "c.png", "prompt": "one\u2028line\x85here"}]
    listed = "\r\n".join(json.dumps(row, ensure_ascii=index == 0) for index, row in enumerate(rows))
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + listed + "\r\n", encoding="utf-8", newline="")
    images = generated_images(tmp_path, AnyPrompt(SUITE))
    assert [image.prompt for image in images] == ["a red circle", "half \ufffd of a pair", "one\u2028line\x85here"]


@pytest.mark.parametrize("beside", [True, False])
def test_white_space_around_a_benchmarks_prompt_does_not_matter(tmp_path, beside):
    class Spaced(SuiteScore):
        def __init__(self):
            super().__init__(SUITE)

        def prompts(self):
            return [f" {text}  \n" for text in super().prompts()]

    write_listed(tmp_path)
    if beside:  # exactly as the benchmark has it
        (tmp_path / "prompts.jsonl").unlink()
        for number, text in enumerate(Spaced().prompts()):
            (tmp_path / f"{number:05d}-1step-0.txt").write_text(text)
    assert [image.prompt for image in generated_images(tmp_path, Spaced())] == Spaced().prompts()


def test_linked_folders_are_looked_into_and_no_circle_is_followed(tmp_path):
    for name in ("mine/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        scene_image(PROMPTS[0]).save(tmp_path / name / f"{name[-1]}.png")
    (tmp_path / "mine/b").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "mine")
    found = image_files(tmp_path / "mine", "folder")
    assert [str(path.relative_to(tmp_path / "mine")) for path in found] == ["a/a.png", "b/r.png"]


def test_images_beside_a_folder_named_samples_count(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("a.png", "b.png", "samples/c.png"):
        scene_image(PROMPTS[0]).save(tmp_path / name)
    assert [path.name for path in image_files(tmp_path, "folder")] == ["a.png", "b.png", "c.png"]
