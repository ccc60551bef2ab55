from __future__ import annotations

import pytest
import torch

from emf_lightning.networks.auraflow import AuraFlowArchitecture, AuraFlowFlowMap
from emf_lightning.text.pretrained import PretrainedTextEncoder
from tests import pipelines

CAPTIONS = ["a red cat", "a photo of two blue dog and a cat and a dog and a cat"]


@pytest.mark.parametrize("length", [6, 20])
def test_its_features_and_its_network_s_inputs_are_the_pipeline_s(tmp_path, length):
    from diffusers import AuraFlowPipeline
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=40, d_kv=8, d_ff=24, num_layers=2, num_heads=2, is_encoder_decoder=False)
    UMT5EncoderModel(config).eval().save_pretrained(tmp_path / "text_encoder")
    pipelines.tokenizer(tmp_path / "tokenizer")
    parts = (
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder"),
    )
    stock = AuraFlowPipeline(*parts, None, None, None)
    encoder = PretrainedTextEncoder(str(tmp_path), length=length, subfolder="text_encoder")
    size = AuraFlowArchitecture(2, 2, 2, 8, pos_embed_max_size=16)
    net = AuraFlowFlowMap(size, latent_size=8, context_width=40).eval()
    z, t, ours = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), encoder(CAPTIONS)
    with torch.no_grad():
        theirs, mask, *_ = stock.encode_prompt(CAPTIONS, max_sequence_length=length, device="cpu")
        assert torch.equal(ours.mask, mask.bool().view(*theirs.shape)[..., 0])  # the pipeline's is as wide as a token
        assert torch.allclose(ours.context, theirs, atol=1e-5)
        u = net(z, t / 2, t, ours.context, ours.mask)
        assert torch.allclose(u, net.model(z, theirs, t, return_dict=False)[0], atol=1e-5)
        masked = ours.context.masked_fill(~ours.mask[..., None], 9.0)
        assert torch.equal(net(z, t, t, masked, ours.mask), u)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="pos_embed_max_size must be a square number, got 60"):
        AuraFlowArchitecture(pos_embed_max_size=60)
    with pytest.raises(ValueError, match="num_single_dit_layers must be at least 1, got 0"):
        AuraFlowArchitecture(num_single_dit_layers=0)
    size = AuraFlowArchitecture(1, 1, 2, 8, pos_embed_max_size=16)
    with pytest.raises(ValueError, match="side 10 have more patches of 2 than pos_embed_max_size=16"):
        AuraFlowFlowMap(size, latent_size=10, context_width=16)
