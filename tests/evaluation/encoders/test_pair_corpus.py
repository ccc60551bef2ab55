from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from emf_lightning.evaluation.encoders.pair_corpus import CocoPairs, Dinov3


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dinov3")
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(4):
        pixels = rng.integers(0, 256, (40, 48, 3), np.uint8) if number < 3 else np.full((40, 48, 3), 30, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"train2017/{number:012d}.jpg")
        images.append({"id": number + 10, "file_name": f"{number:012d}.jpg"})
        for k in (1, 0):
            annotations.append({"id": 100 * number + k, "image_id": number + 10, "caption": f" caption {number}{k} "})
    file = tmp_path / "annotations/captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def test_each_image_of_coco_has_one_caption_and_its_dinov3_cosine(coco, dinov3):
    corpus = CocoPairs(coco, dinov3, device="cpu")
    assert corpus.captions == [f"caption {number}0" for number in range(4)]
    assert CocoPairs(coco, dinov3, caption=1, device="cpu").captions[2] == "caption 21"
    assert corpus.matches_paper
    assert not CocoPairs(coco, dinov3, limit=3, device="cpu").matches_paper
    network = DINOv3ViTModel.from_pretrained(dinov3).eval()
    processor = DINOv3ViTImageProcessor.from_pretrained(dinov3)
    with torch.no_grad():
        vectors = [network(**processor(images=corpus.image(i), return_tensors="pt")).pooler_output[0] for i in range(4)]
    expected = [torch.nn.functional.cosine_similarity(vectors[0], vector, dim=0).item() for vector in vectors]
    np.testing.assert_allclose(corpus.similarity(0, np.arange(4)), expected, atol=1e-4)


def test_what_coco_lacks_is_named(coco, dinov3, tmp_path):
    (coco / "train2017/000000000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image .*000000000002\.jpg; unpack train2017\.zip"):
        CocoPairs(coco, dinov3)
    with pytest.raises(ValueError, match=r"cannot read .*captions_val2017\.json"):
        CocoPairs(coco, dinov3, split="val2017")
    (coco / "annotations/captions_train2017.json").write_text("{}")
    with pytest.raises(ValueError, match="is no COCO caption file"):
        CocoPairs(coco, dinov3)


def test_missing_weights_are_named(coco):
    with pytest.raises(ValueError, match=r"Dinov3: cannot load model='no/dino'.*licence.*hf download no/dino"):
        CocoPairs(coco, "no/dino")


def test_weights_that_lack_a_part_are_refused(dinov3, tmp_path):
    shutil.copytree(dinov3, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"Dinov3: model=.* lacks 1 of the weights of a DINOv3ViTModel, norm.weight among"
    ):
        Dinov3(str(tmp_path), "cpu")
