"""The datamodule on a user's own pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache_filling import CacheFiller
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.reading.sources import HubDataset
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.words import WordEncoder
from tests.data.reading.test_sources import ONES, imagefolder, jsonl, parquet, texts_beside
from tests.data.tars import SIDE


def data(shards: object, **arguments: object) -> CaptionImageData:
    settings = {"resolution": SIDE, "batch_size": 4, "num_workers": 0, "shuffle_block": 8, **arguments}
    return CaptionImageData(WordEncoder(width=8, length=4), Pixels(), shards, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [texts_beside, lambda folder: imagefolder(folder, jsonl), parquet])
def test_a_held_out_share_validates_and_the_rest_trains(make, tmp_path: Path) -> None:
    make(tmp_path / "set")
    module = data(str(tmp_path / "set"), validation_share=0.3)
    module.setup("fit")
    trained = {caption for batch in module.train_dataloader() for caption in batch.captions}
    validated = [caption for batch in module.val_dataloader() for caption in batch.captions]
    assert sorted(validated) == sorted(caption for b in module.validation_batches() for caption in b.captions)
    assert 5 <= len(validated) <= 22
    assert not trained & set(validated)
    assert len(trained) == (44 - len(validated)) // 4 * 4  # whole batches


def test_a_share_that_is_gone_on_resuming_is_noticed(tmp_path: Path) -> None:
    texts_beside(tmp_path / "set")
    loaders = []
    for share in (0.3, 0.0, 0.3):
        module = data(str(tmp_path / "set"), validation_share=share)
        module.setup("fit")
        loaders.append(module.train_dataloader())
    for first, second in ((0, 1), (1, 2)):
        state = loaders[first].state_dict()
        with pytest.warns(UserWarning, match="resumed with other validation_share than the checkpoint's"):
            loaders[second].load_state_dict(state)


def test_a_share_of_nothing_and_two_sources_of_validation_are_refused(tmp_path: Path) -> None:
    texts_beside(tmp_path / "set")
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"validation_share must lie in \[0, 1\)"):
            data(str(tmp_path / "set"), validation_share=share)
    with pytest.raises(ValueError, match="be 0 beside validation_shards"):
        data(str(tmp_path / "set"), validation_share=0.5, validation_shards="x")
    module = data(str(tmp_path / "set"), validation_share=1e-9)
    with pytest.raises(ValueError, match=r"gave no batch of 4 samples .* raise validation_share"):
        list(module.validation_batches())


@pytest.mark.parametrize("several", [False, True])
def test_the_command_line_takes_a_hub_data_set_by_its_parts(several: bool) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CaptionImageData, "data", skip={"text", "autoencoder"}, instantiate=False)
    entry = '{"name": "owner/name", "split": "validation"}'
    given = parser.parse_args([f"--data.shards={f'[{entry}]' if several else entry}"])
    shards = parser.instantiate_classes(given).data.shards
    assert shards == ([HubDataset("owner/name", "validation")] if several else HubDataset("owner/name", "validation"))


def test_caches_are_filled_from_a_folder(tmp_path: Path) -> None:
    texts_beside(tmp_path / "set")
    module = data(str(tmp_path / "set"), cache=FeatureCache(tmp_path / "cache", max_gb=0.1))
    filler = CacheFiller(module, torch.device("cpu"))
    assert filler.count() == len(ONES)
    assert list(filler.fill())[-1].done == len(ONES)
