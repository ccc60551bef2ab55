import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from emf_lightning.text.base import NULL_CAPTION
from emf_lightning.text.open_clip import OpenClipTextEncoder

CONTEXT = 10
VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16, "head_width": 8}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def register(folder: Path, name: str, text: dict) -> Path:
    """The checkpoint of a model with random weights that OpenCLIP knows as ``name`` from now on."""
    import open_clip

    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained_text=False)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # far from the linear range: activations must tell
    torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder / f"{name}.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights of a tiny CLIP named ``emf-tiny``."""
    return register(tmp_path_factory.mktemp("open_clip"), "emf-tiny", TEXT)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return OpenClipTextEncoder("emf-tiny", str(checkpoint))


def save_tokenizer(folder: Path, starts: str) -> None:
    """A tokenizer that pads with its end token, as SigLIP's does; ``starts`` goes before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "red": 3, "cube": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{starts} $A </s>".strip(), special_tokens=special)
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    save_tokenizer(folder, starts="<s>")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=CONTEXT,
        )
    ).save_pretrained(folder)


def test_the_end_token_projected_is_the_model_s_own_text_embedding(checkpoint, encoder):
    import open_clip

    captions = ["a red cube", "wow!&", NULL_CAPTION]
    features = encoder(captions)
    assert features.context.shape == (3, CONTEXT, 16)
    assert (encoder.length, encoder.width) == (CONTEXT, 16)
    model = open_clip.create_model("emf-tiny", str(checkpoint)).eval()
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("emf-tiny")(captions))
    last = features.mask.sum(dim=1) - 1
    torch.testing.assert_close(features.context[range(3), last] @ model.text_projection, expected)


def test_the_mask_ends_with_the_end_token_even_where_an_exclamation_mark_has_the_padding_s_id(encoder):
    ids = encoder.tokenizer(["wow!&"])[0]
    assert 0 in ids[: ids.argmax()]  # the trap is there
    features = encoder(["wow!&", NULL_CAPTION])
    assert features.mask.sum(dim=1).tolist() == [int(ids.argmax()) + 1, 2]
    assert not features.context[~features.mask].any()
    assert features.context[features.mask].any(dim=1).all()


def test_a_shorter_length_keeps_the_features_of_what_fits(checkpoint, encoder):
    short = OpenClipTextEncoder("emf-tiny", str(checkpoint), length=6)
    assert short.length == 6
    features, expected = short(["a red cube"]), encoder(["a red cube"])
    assert torch.equal(features.mask, expected.mask[:, :6])
    torch.testing.assert_close(features.context, expected.context[:, :6])


def test_only_captions_that_lose_a_token_are_counted(checkpoint):
    encoder = OpenClipTextEncoder("emf-tiny", str(checkpoint), length=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a red cube", "red"])  # with start and end, exactly 5 and 3
    with pytest.warns(UserWarning, match="1 of 4 captions so far are longer than length=5"):
        features = encoder(["a red cube on", "red"])
    assert encoder.truncated == 1
    assert features.mask.sum(dim=1).tolist() == [5, 3]
    # truncation keeps the end token: it is the caption without its last word
    assert torch.equal(features.context[0], encoder(["a red cube", "red"]).context[0])


def test_the_openai_tag_brings_quick_gelu(checkpoint, encoder, monkeypatch):
    from open_clip import pretrained

    tag = {"file": str(checkpoint), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "emf-tiny", {"openai": tag})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        tagged = OpenClipTextEncoder("emf-tiny", "openai")
    told = OpenClipTextEncoder("emf-tiny", str(checkpoint), quick_gelu=True)
    assert torch.equal(tagged(["a red cube"]).context, told(["a red cube"]).context)
    assert tagged.fingerprint == told.fingerprint != encoder.fingerprint
    assert not torch.allclose(tagged(["a red cube"]).context, encoder(["a red cube"]).context, atol=1e-3)


def test_a_tower_from_hugging_face_keeps_its_class_token_to_itself(tmp_path):
    save_bert(tmp_path / "bert")
    bert = str(tmp_path / "bert")
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "hf_pooler_type": "cls_pooler", "context_length": CONTEXT}
    checkpoint = register(tmp_path, "emf-bert", text)
    encoder = OpenClipTextEncoder("emf-bert", str(checkpoint))
    features = encoder(["red cube", NULL_CAPTION])
    assert (encoder.length, encoder.width) == (CONTEXT - 1, 8)
    assert features.context.shape == (2, CONTEXT - 1, 8)
    assert features.mask.sum(dim=1).tolist() == [3, 1]  # the words and the end token, but not padding with its id
    assert len(encoder.fingerprint) == 64


def test_the_first_of_the_end_tokens_that_pad_is_the_caption_s_own(tmp_path):
    save_tokenizer(tmp_path, starts="")
    text = {**TEXT, "vocab_size": 8, "hf_tokenizer_name": str(tmp_path), "no_causal_mask": True, "pool_type": "last"}
    encoder = OpenClipTextEncoder("emf-siglip", str(register(tmp_path, "emf-siglip", text)))
    features = encoder(["red cube", NULL_CAPTION])
    assert features.mask.sum(dim=1).tolist() == [3, 1]
    assert features.mask[:, 0].all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder(["red " * (CONTEXT - 1)]).mask.all()
    with pytest.warns(UserWarning, match="1 of 4 captions"):
        encoder(["red " * CONTEXT])


def test_features_are_float32_whatever_the_dtype_and_the_autocast(checkpoint, encoder):
    half = OpenClipTextEncoder("emf-tiny", str(checkpoint), dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(["a red cube"]).context.dtype == torch.float32
    expected = encoder(["a red cube"]).context
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(["a red cube"]).context, expected)


def test_the_template_wraps_every_caption(checkpoint, encoder):
    wrapped = OpenClipTextEncoder("emf-tiny", str(checkpoint), template="a {caption} cube")
    assert torch.equal(wrapped(["red"]).context, encoder(["a red cube"]).context)


def test_the_fingerprint_is_of_the_content_not_of_the_place(checkpoint, encoder, tmp_path):
    from safetensors.torch import save_file

    copy = shutil.copy(checkpoint, tmp_path / "elsewhere.pt")
    assert OpenClipTextEncoder("emf-tiny", str(copy)).fingerprint == encoder.fingerprint
    state = torch.load(checkpoint)
    save_file(state, tmp_path / "elsewhere.safetensors")
    assert OpenClipTextEncoder("emf-tiny", str(tmp_path / "elsewhere.safetensors")).fingerprint == encoder.fingerprint
    state["ln_final.bias"][0] += 1e-6
    torch.save(state, copy)
    assert OpenClipTextEncoder("emf-tiny", str(copy)).fingerprint != encoder.fingerprint


@pytest.mark.parametrize("other", [{"length": 7}, {"dtype": "bfloat16"}, {"template": "a {caption}"}], ids=str)
def test_every_setting_is_in_the_fingerprint(checkpoint, encoder, other):
    assert OpenClipTextEncoder("emf-tiny", str(checkpoint), **other).fingerprint != encoder.fingerprint


def test_only_the_text_tower_is_kept_and_it_is_frozen(encoder):
    assert not any("visual" in name for name, _ in encoder.named_parameters())
    assert not any(module.training for module in encoder.train().modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("model", "pretrained"), [("no-such-model", "openai"), ("emf-tiny", "/no/such/file.pt"), ("emf-tiny", None)]
)
def test_weights_that_are_not_there_say_what_to_do(checkpoint, model, pretrained):
    with pytest.raises(ValueError, match=f"model='{model}'.*list_models"):
        OpenClipTextEncoder(model, pretrained)


@pytest.mark.parametrize(("bad", "message"), [({"template": "caption"}, "template"), ({"length": 11}, "between 1 and")])
def test_senseless_settings_are_refused(checkpoint, bad, message):
    with pytest.raises(ValueError, match=message):
        OpenClipTextEncoder("emf-tiny", str(checkpoint), **bad)
