from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from emf_lightning.callbacks import FewStepSampling, SaveEncoder, WeightEMA
from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.latents.pixels import Pixels
from emf_lightning.modules.encoder_tuning import EncoderTuning
from emf_lightning.modules.optimization import Optimization
from emf_lightning.text.pretrained import PretrainedTextEncoder
from tests import tiny_checkpoints
from tests.callbacks import tiny


@pytest.fixture
def gemma(tmp_path):
    tiny_checkpoints.language_model(tmp_path / "gemma", "Gemma2")
    return str(tmp_path / "gemma")


def data(tmp_path, model: str, dtype: str = "float32", **arguments) -> CaptionImageData:
    encoder = PretrainedTextEncoder(model, 8, dtype=dtype)
    shards = str(tiny.shards(tmp_path / "shards"))
    return CaptionImageData(encoder, Pixels(), shards, batch_size=8, num_workers=0, shuffle_block=16, **arguments)


def test_encoder_and_network_learn_together_and_the_encoder_is_written(tmp_path, gemma):
    tuning = EncoderTuning(
        tiny.network(),
        optimization=Optimization(lambda groups: torch.optim.AdamW(groups, lr=1e-2)),
        encoder_rate=0.5,
    )
    samples = data(tmp_path, gemma)
    before = [copy.deepcopy(part.state_dict()) for part in (tuning.net, samples.text)]
    trainer = tiny.trainer(tmp_path / "run", SaveEncoder(), max_steps=2)
    trainer.fit(tuning, datamodule=samples)

    for part, old in zip((tuning.net, samples.text), before, strict=True):
        assert sum(not torch.equal(old[name], value) for name, value in part.state_dict().items()) > 3
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 5e-3]
    again = PretrainedTextEncoder(str(tmp_path / "run/encoder"), 8)
    captions = ["a red cube", "", "two ring on a ball"]
    assert torch.allclose(again(captions).context, samples.text(captions).context, atol=1e-6)
    assert not torch.allclose(again(captions).context, PretrainedTextEncoder(gemma, 8)(captions).context, atol=1e-4)
    assert torch.allclose(samples.null_features().context, again([""]).context, atol=1e-6), (
        "the null caption's is fresh"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bfloat16"}, "set float32"),
        ({"cache": "cache"}, "data.cache would keep"),
    ],
)
def test_settings_under_which_an_encoder_would_not_learn_are_refused(tmp_path, gemma, settings, said):
    if "cache" in settings:
        settings = {"cache": FeatureCache(tmp_path / "cache", max_gb=0.01)}
    trainer = tiny.trainer(tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match=said):
        trainer.fit(EncoderTuning(tiny.network()), datamodule=data(tmp_path, gemma, **settings))


def test_sharded_strategies_are_refused(tmp_path, gemma):
    tuning = EncoderTuning(tiny.network())
    tuning.trainer = Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(1, 1), logger=False)
    with pytest.raises(ValueError, match=r"EncoderTuning: ModelParallelStrategy shards one network.*set ddp"):
        tuning.configure_model()


def test_guided_samples_during_training_have_the_null_caption_of_the_weights_in_place(tmp_path, gemma):
    apart = []

    class Watched(EncoderTuning):
        def sample_latents(self, text, null, noise, steps, guidance_scale=None):
            now = self.encoder([""]).to(null.context.device)
            apart.append((now.context - null.context).abs().max().item())
            return super().sample_latents(text, null, noise, steps, guidance_scale)

    rate = Optimization(lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    tuning = Watched(tiny.network(), optimization=rate, guidance_scale=2.0)
    sampling = FewStepSampling(prompts=["a red cube"], steps=[1], every_n_steps=1, figures=False)
    trainer = tiny.trainer(tmp_path / "run", WeightEMA(decay=0.9), sampling, max_steps=3)
    trainer.fit(tuning, datamodule=data(tmp_path, gemma))
    assert len(apart) == 4
    assert max(apart) < 1e-6
