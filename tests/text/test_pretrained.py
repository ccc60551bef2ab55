import shutil
import warnings
from pathlib import Path

import pytest
import torch

from emf_lightning.text.base import NULL_CAPTION
from emf_lightning.text.pretrained import PretrainedTextEncoder, save_tower

WORDS = ["a", "photo", "of", "red", "blue", "green", "cube", "ball", "ring", "and", "under", "on", "two", "three"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save_tokenizer(folder: Path, ends: bool = True, pad: bool = True, **settings) -> None:
    """Words for tokens; with ``ends``, each text ends in </s>, else nothing is added."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings).save_pretrained(folder)


def make_model(kind: str) -> torch.nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if kind == "bert":
        return t.BertModel(t.BertConfig(vocab_size=32, max_position_embeddings=32, **SMALL))
    if kind == "qwen3":
        return t.Qwen3Model(t.Qwen3Config(vocab_size=32, num_key_value_heads=1, head_dim=8, **SMALL))
    if kind == "t5":
        return t.T5Model(t.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    text = {"vocab_size": 32, "max_position_embeddings": 24, "eos_token_id": 1, **SMALL}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 16, **SMALL}))


KINDS = ("bert", "qwen3", "t5", "clip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of model."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make_model(kind).eval().save_pretrained(root / kind)
        save_tokenizer(root / kind)
    return root


@pytest.fixture
def qwen(folders, tmp_path):
    """A copy of the decoder-only model's folder, to be changed."""
    return Path(shutil.copytree(folders / "qwen3", tmp_path / "qwen3"))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_last_hidden_states_of_the_text_part_alone(folders, kind):
    encoder = PretrainedTextEncoder(str(folders / kind), length=12)
    captions = ["a red cube", "a photo of two blue ball on a green ring"]
    features = encoder(captions)
    assert features.context.shape == (2, 12, 16)
    assert (encoder.length, encoder.width) == (12, 16)
    assert features.mask.sum(dim=1).tolist() == [4, 11]
    whole = make_model(kind).eval()
    part = {"t5": lambda: whole.encoder, "clip": lambda: whole.text_model}.get(kind, lambda: whole)()
    for row, caption in enumerate(captions):
        ids = torch.tensor([[3 + WORDS.index(word) for word in caption.split()] + [1]])
        states = part(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features.context[row, : len(states)], states, atol=1e-5, rtol=1e-4)
        assert features.mask[row, : len(states)].all()
        assert not features.context[row, len(states) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_neighbours_in_the_batch(folders, kind):
    encoder = PretrainedTextEncoder(str(folders / kind), length=12)
    alone = encoder(["a red cube"])
    together = encoder(["a photo of two blue ball on a green ring", "a red cube"])[1:]
    assert torch.equal(alone.mask, together.mask)
    torch.testing.assert_close(alone.context, together.context, atol=1e-5, rtol=1e-4)


def test_padding_is_on_the_right_whatever_the_tokenizer_s_side(qwen):
    expected = PretrainedTextEncoder(str(qwen), length=6)(["a red cube", "ring"])
    save_tokenizer(qwen, padding_side="left", truncation_side="left")
    encoder = PretrainedTextEncoder(str(qwen), length=6)
    features = encoder(["a red cube", "ring"])
    assert torch.equal(features.mask, expected.mask)
    assert torch.equal(features.context, expected.context)
    with pytest.warns(UserWarning, match="lose their end"):
        cut = encoder(["two red cube and three blue ball"])
    torch.testing.assert_close(cut.context[:, :5], encoder(["two red cube and three"]).context[:, :5])


def test_a_tokenizer_without_padding_token_will_do(qwen):
    expected = PretrainedTextEncoder(str(qwen), length=6)(["a red cube", "ring"])
    save_tokenizer(qwen, pad=False)
    features = PretrainedTextEncoder(str(qwen), length=6)(["a red cube", "ring"])
    assert torch.equal(features.mask, expected.mask)
    torch.testing.assert_close(features.context, expected.context)


@pytest.mark.parametrize("ends", [True, False])
def test_the_null_caption_has_one_token_even_if_the_tokenizer_gives_none(qwen, ends):
    save_tokenizer(qwen, ends=ends)
    null = PretrainedTextEncoder(str(qwen), length=6)([NULL_CAPTION, "a red cube"])[:1]
    assert null.mask[0].tolist() == [True] + [False] * 5
    assert null.context[0, 0].any()


def test_only_captions_that_lose_a_token_are_counted(qwen):
    encoder = PretrainedTextEncoder(str(qwen), length=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["a red cube", "ring"])  # with the end token, exactly 4 and 2
    with pytest.warns(UserWarning, match=r"2 of 5 captions so far are longer than length=4"):
        features = encoder(["a red cube and", "ring", "a photo of a red cube"])
    encoder(["two red cube and three blue ball"])
    assert encoder.truncated == 3
    assert features.mask.sum(dim=1).tolist() == [4, 2, 4]


def test_the_template_wraps_every_caption(qwen):
    plain = PretrainedTextEncoder(str(qwen), length=8)
    wrapped = PretrainedTextEncoder(str(qwen), length=8, template="a photo of {caption} on {}")
    assert torch.equal(wrapped(["cube"]).context, plain(["a photo of cube on {}"]).context)
    assert torch.equal(wrapped([NULL_CAPTION]).context, plain(["a photo of  on {}"]).context)


def test_of_an_encoder_decoder_the_decoder_is_not_even_loaded(folders, tmp_path):
    import transformers

    encoder = PretrainedTextEncoder(str(folders / "t5"), length=6)
    whole = make_model("t5").eval()
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in whole.encoder.parameters())
    alone = transformers.T5EncoderModel(whole.config)  # as Stable Diffusion 3 and FLUX publish theirs
    alone.encoder.load_state_dict(whole.encoder.state_dict())
    alone.shared.load_state_dict(whole.shared.state_dict())
    alone.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    features = PretrainedTextEncoder(str(tmp_path), length=6)(["a red cube"])
    assert torch.equal(features.context, encoder(["a red cube"]).context)


@pytest.mark.parametrize("number", ["", "_2"])
def test_a_pipeline_s_repository_has_encoder_and_tokenizer_side_by_side(folders, tmp_path, number):
    make_model("clip").text_model.eval().save_pretrained(tmp_path / f"text_encoder{number}")
    save_tokenizer(tmp_path / f"tokenizer{number}")
    encoder = PretrainedTextEncoder(str(tmp_path), length=6, subfolder=f"text_encoder{number}")
    expected = PretrainedTextEncoder(str(folders / "clip"), length=6)
    torch.testing.assert_close(encoder(["a red cube"]).context, expected(["a red cube"]).context)
    with pytest.raises(ValueError, match="cannot load"):
        PretrainedTextEncoder(str(tmp_path), length=6, subfolder="text_encoder_3")


CHAT = "{% for m in messages %}<unk>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}on{% endif %}"


def test_a_chat_is_the_tokenizer_s_own_format_and_has_no_special_tokens_twice(qwen):
    save_tokenizer(qwen, chat_template=CHAT)
    encoder = PretrainedTextEncoder(str(qwen), length=9, chat=True, template="a {caption}")
    features = encoder(["red cube", NULL_CAPTION])
    assert features.mask.sum(dim=1).tolist() == [6, 4]  # <unk> a red cube </s> on
    ids = torch.tensor([[2, 3, 6, 9, 1, 3 + WORDS.index("on")]])
    states = make_model("qwen3").eval()(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(features.context[0, :6], states, atol=1e-5, rtol=1e-4)
    plain = PretrainedTextEncoder(str(qwen), length=9, template="a {caption}")
    assert plain.fingerprint != encoder.fingerprint


def test_a_chat_whose_format_writes_the_date_is_of_one_day(qwen, monkeypatch):
    save_tokenizer(qwen, chat_template="{{ strftime_now('%d %b %Y') }} " + CHAT)
    encoder = PretrainedTextEncoder(str(qwen), length=9, chat=True)
    assert encoder._text("red cube").startswith("26 Jul 2024 <unk>red cube")
    other = PretrainedTextEncoder(str(qwen), length=9, chat=True)
    assert encoder.fingerprint == other.fingerprint
    monkeypatch.setattr(
        "emf_lightning.text.pretrained.FIXED_DAY", "{%- macro strftime_now(f) -%}1 Jan 2020{%- endmacro -%}"
    )
    assert PretrainedTextEncoder(str(qwen), length=9, chat=True).fingerprint != encoder.fingerprint


@pytest.mark.parametrize(("kind", "length"), [("clip", 25), ("bert", 33), ("roberta", 31)])
def test_more_tokens_than_the_model_has_positions_are_refused(folders, tmp_path, kind, length):
    folder = folders / kind
    if kind == "roberta":
        import transformers as t

        folder = tmp_path
        sizes = {"vocab_size": 32, "max_position_embeddings": 32, "pad_token_id": 1}
        t.RobertaModel(t.RobertaConfig(**sizes, **SMALL)).save_pretrained(folder)
        save_tokenizer(folder)
    with pytest.raises(ValueError, match=f"length={length} is more than the {length - 1} positions"):
        PretrainedTextEncoder(str(folder), length=length)
    encoder = PretrainedTextEncoder(str(folder), length=length - 1)
    assert encoder([" ".join(["red"] * 100)]).context.isfinite().all()


def test_a_chat_needs_a_format(qwen):
    with pytest.raises(ValueError, match="has no chat format"):
        PretrainedTextEncoder(str(qwen), length=9, chat=True)


def test_a_layer_is_chosen_from_the_hidden_states(folders):
    ids = torch.tensor([[3, 6, 9, 1]])
    for kind in KINDS:
        whole = make_model(kind).eval()
        part = {"t5": lambda m: m.encoder, "clip": lambda m: m.text_model}.get(kind, lambda m: m)(whole)
        states = part(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in (0, 1, -2):
            features = PretrainedTextEncoder(str(folders / kind), length=8, layer=layer)(["a red cube"])
            torch.testing.assert_close(features.context[:, :4], states[layer], atol=1e-5, rtol=1e-4)


def test_features_are_float32_whatever_the_dtype_and_the_autocast(folders):
    encoder = PretrainedTextEncoder(str(folders / "bert"), length=6, dtype="bfloat16")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder(["a red cube"]).context.dtype == torch.float32
    encoder = PretrainedTextEncoder(str(folders / "bert"), length=6)
    expected = encoder(["a red cube"]).context
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder(["a red cube"]).context, expected)


def test_infinite_features_are_refused(tmp_path):
    model = make_model("bert")
    model.encoder.layer[1].output.LayerNorm.weight.data.fill_(1e5)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert PretrainedTextEncoder(str(tmp_path), length=6)(["a red cube"]).context.isfinite().all()
    with pytest.raises(ValueError, match=r"float16.*bfloat16"):
        PretrainedTextEncoder(str(tmp_path), length=6, dtype="float16")(["a red cube"])


def test_the_fingerprint_is_of_the_content_not_of_the_place_or_the_use(folders, qwen):
    encoder = PretrainedTextEncoder(str(qwen), length=6)
    encoder(["a red cube", "ring"])  # leaves truncation behind in the tokenizer
    assert encoder.fingerprint == PretrainedTextEncoder(str(folders / "qwen3"), length=6).fingerprint


@pytest.mark.parametrize(
    "other", [{"length": 7}, {"layer": -2}, {"dtype": "bfloat16"}, {"template": "a {caption}"}], ids=str
)
def test_every_setting_is_in_the_fingerprint(qwen, other):
    settings = {"model": str(qwen), "length": 6}
    assert PretrainedTextEncoder(**settings | other).fingerprint != PretrainedTextEncoder(**settings).fingerprint


def test_weights_architecture_and_tokenizer_are_in_the_fingerprint(qwen):
    from transformers import Qwen3Config

    fingerprints = [PretrainedTextEncoder(str(qwen), length=6).fingerprint]
    config = Qwen3Config.from_pretrained(qwen)
    config.rms_norm_eps *= 2
    config.save_pretrained(qwen)
    fingerprints.append(PretrainedTextEncoder(str(qwen), length=6).fingerprint)
    save_tokenizer(qwen, ends=False)
    fingerprints.append(PretrainedTextEncoder(str(qwen), length=6).fingerprint)
    model = make_model("qwen3")
    model.norm.weight.data[3] += 1e-6
    model.save_pretrained(qwen)
    fingerprints.append(PretrainedTextEncoder(str(qwen), length=6).fingerprint)
    assert len(set(fingerprints)) == 4


def test_it_is_frozen_and_stays_in_eval_mode(folders):
    encoder = PretrainedTextEncoder(str(folders / "bert"), length=6).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(["ring"]).context.requires_grad


@pytest.mark.parametrize("name", ["somebody/no-such-model", "/no/such/folder"])
def test_a_model_that_is_not_there_says_what_to_do(name):
    with pytest.raises(ValueError, match=f"model='{name}'.*hf download.*local folder"):
        PretrainedTextEncoder(name, length=6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"template": "caption"}, "template"),
        ({"length": 0}, "length"),
        ({"layer": 3}, "hidden states"),
        ({"layer": -4}, "layer"),
    ],
    ids=str,
)
def test_senseless_settings_are_refused(folders, bad, message):
    with pytest.raises(ValueError, match=message):
        PretrainedTextEncoder(**{"model": str(folders / "bert"), "length": 6} | bad)


@pytest.mark.parametrize("kind", ["umt5", "bart", "siglip", "t5", "clip"])
def test_a_tower_alone_is_read_back(tmp_path, kind):
    import transformers as t

    torch.manual_seed(0)
    small = {"vocab_size": 32, "d_model": 16}
    text = {"vocab_size": 32, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 1, **SMALL}
    vision = {"image_size": 32, "patch_size": 16, **SMALL}
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24}
    model = {
        "umt5": lambda: t.UMT5Model(t.UMT5Config(**small, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
        "bart": lambda: t.BartModel(t.BartConfig(**small, **layers, **widths)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)),
    }.get(kind, lambda: make_model(kind))()
    model.eval().save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    encoder = PretrainedTextEncoder(str(tmp_path / "whole"), length=12)
    encoder.tower.get_parameter(next(name for name, _ in encoder.tower.named_parameters())).data.add_(1.0)
    save_tower(encoder, tmp_path / "tower")
    again = PretrainedTextEncoder(str(tmp_path / "tower"), length=12)
    captions = ["a red cube", "two ring on a ball"]
    assert torch.equal(again(captions).context, encoder(captions).context)
    assert again.fingerprint == encoder.fingerprint
    with torch.device("meta"):
        planned = PretrainedTextEncoder(str(tmp_path / "tower"), length=12)
    assert {*planned.tower.state_dict()} == {*encoder.tower.state_dict()}


def test_a_folder_in_the_home_folder(qwen, monkeypatch):
    monkeypatch.setenv("HOME", str(qwen.parent))
    captions = ["a red cube"]
    same = [PretrainedTextEncoder(name, length=12)(captions).context for name in (str(qwen), "~/qwen3")]
    assert torch.equal(*same)
