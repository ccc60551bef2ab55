import json
import re

import pytest
import torch
from torch.nn import functional as F

from emf_lightning.text.base import NULL_CAPTION
from emf_lightning.text.blip3o_next import BLIP3oNext, pool_tokens
from tests.tiny_blip3o import (
    CODES,
    CONTEXT,
    SETTINGS,
    SIDE,
    TINY,
    TOKENS,
    make_config,
    make_tensors,
    make_tokenizer,
    save_checkpoint,
)

SHORT, LONG = "a red cube", "a photo of two blue ball on a green ring"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("blip3o"), shards=2)


@pytest.fixture(scope="module")
def encoder(folder):
    return BLIP3oNext(str(folder), **SETTINGS)


@pytest.fixture(scope="module")
def published(folder):
    """The language model as transformers alone loads it, the tokenizer, and the tensors by name."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tensors, config = make_tensors(make_config()["vocab_size"]), make_config()
    own = {key: config[key] for key in ("vocab_size", "num_key_value_heads", "head_dim", "rms_norm_eps", *TINY)}
    model = Qwen3ForCausalLM(Qwen3Config(**own, rope_parameters={"rope_type": "default", "rope_theta": 1000000})).eval()
    model.load_state_dict({key: value for key, value in tensors.items() if key in model.state_dict()})
    return model, make_tokenizer(), tensors


def prompt_ids(tokenizer, caption: str) -> list[int]:
    """The prompt as the chat template of the published tokenizer and its inference script write it."""
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Please generate image based on the following caption: {caption}<|im_end|>\n<|im_start|>assistant\n"
        "<im_start><S0>"
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def connect(tensors, states):
    """The connector: Linear, GELU in its tanh form, Linear, RMSNorm."""
    t = {key: tensors[f"model.diffusion_connector.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = F.linear(F.gelu(F.linear(states, t["0.weight"], t["0.bias"]), approximate="tanh"), *list(t.values())[2:])
    return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * 5.5**0.5


def images(rows: int) -> torch.Tensor:
    return torch.rand(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_codes_are_the_nearest_entries_to_the_features_before_the_last_layer(encoder, published):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    tensors = published[2]
    place = "model.vision_tower.vision_tower."
    own = {key.removeprefix(place): value for key, value in tensors.items() if key.startswith(place)}
    tower = SiglipVisionModel(SiglipVisionConfig(**TINY | {"num_hidden_layers": 3}, image_size=SIDE, patch_size=4))
    tower.load_state_dict({k.removeprefix("encoder."): v for k, v in own.items() if k.startswith("encoder.")})
    with torch.no_grad():
        features = tower.eval()(images(3), output_hidden_states=True).hidden_states[-2]
    features = torch.tanh(F.linear(features, own["encode_task_layer.0.weight"], own["encode_task_layer.0.bias"]))
    wanted = F.linear(features, own["bottleneck.in_linear.weight"], own["bottleneck.in_linear.bias"]).double()
    quantizer = {k.split("regularizer.")[1]: v.double() for k, v in own.items() if "regularizer" in k}
    book = quantizer["embedding.weight"] @ quantizer["embedding_proj.weight"].T + quantizer["embedding_proj.bias"]
    distance = torch.cdist(F.normalize(wanted, dim=-1), F.normalize(book, dim=-1)[None].expand(3, -1, -1))
    codes = encoder.images(images(3))
    assert codes.shape == (3, TOKENS)
    assert torch.equal(codes, distance.argmin(-1))
    assert len(codes.unique()) > TOKENS


def test_training_reads_the_states_from_the_scale_token_to_the_last_code(encoder, published):
    model, tokenizer, tensors = published
    features = encoder.encode_pairs([SHORT, LONG], images(2))
    codes = encoder.images(images(2))
    assert features.context.shape == (2, 1 + TOKENS, CONTEXT) == (2, encoder.length, encoder.width)
    assert features.mask.all()
    closing = tokenizer("<im_end><|im_end|>\n", add_special_tokens=False)["input_ids"]
    for row, caption in enumerate((SHORT, LONG)):  # one by one, without padding, and with the end of the turn
        prompt, code_ids = prompt_ids(tokenizer, caption), (codes[row] + make_config()["image_start_token_id"]).tolist()
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + code_ids + closing])).last_hidden_state[0]
        scale = prompt.index(tokenizer.convert_tokens_to_ids("<S0>"))
        expected = connect(tensors, states[scale : scale + 1 + TOKENS])
        torch.testing.assert_close(features.context[row], expected, atol=2e-5, rtol=1e-4)


def test_states_are_those_of_a_batch_padded_on_the_right_as_the_released_training_pads(encoder, published):
    model, tokenizer, _ = published
    codes = torch.tensor([[0, 5, 7, 1, 1, 40, 47, 2, 3], [9, 9, 30, 21, 2, 4, 6, 8, 0]])
    rows = [prompt_ids(tokenizer, caption) for caption in (SHORT, LONG)]
    starts = [len(row) - 1 for row in rows]
    rows = [row + (codes[i] + make_config()["image_start_token_id"]).tolist() for i, row in enumerate(rows)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        padded = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = torch.stack([padded[i, start : start + 1 + TOKENS] for i, start in enumerate(starts)])
    torch.testing.assert_close(encoder.hidden_states([SHORT, LONG], codes), expected, atol=2e-5, rtol=1e-4)


def test_generated_tokens_give_the_same_hidden_states_when_they_are_read(encoder):
    codes, states = encoder.generate([SHORT, LONG])
    assert codes.shape == (2, TOKENS)
    assert 0 <= codes.min() and codes.max() < CODES
    torch.testing.assert_close(states, encoder.hidden_states([SHORT, LONG], codes), atol=2e-5, rtol=1e-4)


def test_a_caption_s_tokens_and_features_do_not_depend_on_the_batch(encoder, folder):
    codes, _ = encoder.generate([SHORT, LONG, "ring"])
    for row, caption in enumerate((SHORT, LONG, "ring")):
        assert torch.equal(encoder.generate([caption])[0][0], codes[row])
    together = encoder([SHORT, NULL_CAPTION, LONG, "ring"])
    by_twos = BLIP3oNext(str(folder), **SETTINGS, batch_size=2)([SHORT, NULL_CAPTION, LONG, "ring"])
    torch.testing.assert_close(together.context, by_twos.context, atol=2e-5, rtol=1e-4)
    assert together.mask.all()


def test_the_seed_and_the_caption_choose_the_tokens(encoder, folder):
    first, again = encoder.generate([SHORT])[0], encoder.generate([SHORT])[0]
    assert torch.equal(first, again)
    other = BLIP3oNext(str(folder), **SETTINGS, seed=1)
    assert not torch.equal(other.generate([SHORT])[0], first)


def test_greedy_tokens_are_the_likeliest_codes(folder, published):
    model, tokenizer, _ = published
    codes = BLIP3oNext(str(folder), **SETTINGS, top_k=1).generate([LONG])[0][0]
    first = make_config()["image_start_token_id"]
    ids = prompt_ids(tokenizer, LONG)
    for code in codes.tolist():
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert code == logits[first : first + CODES].argmax()
        ids.append(first + code)


def test_a_fixed_cache_gives_what_a_growing_one_gives(folder, encoder):
    fixed = BLIP3oNext(str(folder), **SETTINGS, compiled=True)
    with torch.compiler.set_stance("force_eager"):
        with torch.inference_mode():  # a validation, before training goes on with the same cache
            fixed.generate(["ring"])
        for captions in ([SHORT], [SHORT, LONG], ["ring", "two ball"]):  # the third reuses the cache of the second
            codes, states = encoder.generate(captions)
            fixed_codes, fixed_states = fixed.generate(captions)
            assert torch.equal(codes, fixed_codes)
            torch.testing.assert_close(states, fixed_states, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_compiled_step_gives_what_the_plain_one_gives(folder, encoder):
    compiled = BLIP3oNext(str(folder), **SETTINGS, compiled=True)
    for captions in ([SHORT, LONG], ["ring", "two ball"]):
        torch.testing.assert_close(compiled.generate(captions)[1], encoder.generate(captions)[1], atol=2e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_null_condition_is_the_connector_of_nothing(encoder, published):
    null = encoder([NULL_CAPTION])
    expected = connect(published[2], torch.zeros(1, 1 + TOKENS, TINY["hidden_size"]))
    torch.testing.assert_close(null.context, expected, atol=1e-6, rtol=1e-5)
    assert null.context.any() and null.mask.all()


def test_tokens_are_averaged_over_squares_of_patches_behind_the_scale_token(folder, encoder):
    pooled = BLIP3oNext(str(folder), **SETTINGS, token_pool=3)
    whole = encoder.encode_pairs([SHORT, LONG], images(2)).context
    features = pooled.encode_pairs([SHORT, LONG], images(2))
    assert features.context.shape == (2, pooled.length, CONTEXT) == (2, 2, CONTEXT)
    assert features.mask.all()
    torch.testing.assert_close(features.context, torch.stack([whole[:, 0], whole[:, 1:].mean(1)], dim=1))
    assert pooled([SHORT, NULL_CAPTION]).context.shape == (2, 2, CONTEXT)
    numbers = torch.arange(37.0)[None, :, None]  # a scale token, and 6 x 6 patches in rows
    assert pool_tokens(numbers, 3).flatten().tolist() == [0, 8, 11, 26, 29]
    with pytest.raises(ValueError, match="token_pool=2 does not divide the 3 patches"):
        BLIP3oNext(str(folder), **SETTINGS, token_pool=2)


def test_a_caption_that_is_too_long_loses_its_end_and_not_the_answer_s_beginning(folder, encoder):
    short = BLIP3oNext(str(folder), **SETTINGS, caption_tokens=25)
    with pytest.warns(UserWarning, match="lose their end"):
        ids, _, _ = short._prompts([LONG])
    assert ids.shape[1] == 25 + 5
    assert ids[0, :25].tolist() == encoder._prompts([LONG])[0][0, :25].tolist()
    assert ids[0, 25:].tolist() == encoder._prompts([LONG])[0][0, -5:].tolist()
    assert short.truncated == 1


def test_features_are_float32_of_a_frozen_model_whatever_the_autocast(folder, encoder):
    half = BLIP3oNext(str(folder), **SETTINGS | {"dtype": "bfloat16"}).train()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in half.modules())
    assert not any(parameter.requires_grad for parameter in half.parameters())
    assert half([SHORT]).context.dtype == torch.float32
    expected = encoder.encode_pairs([SHORT], images(1)).context
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode_pairs([SHORT], images(1)).context, expected)


def test_one_file_several_files_and_tied_embeddings_load(tmp_path, encoder):
    one = BLIP3oNext(str(save_checkpoint(tmp_path / "one")), **SETTINGS)
    assert one.fingerprint == encoder.fingerprint
    tied = BLIP3oNext(str(save_checkpoint(tmp_path / "tied", tie=True)), **SETTINGS)
    assert torch.equal(tied.language.lm_head.weight, tied.language.model.embed_tokens.weight)
    assert tied.fingerprint != encoder.fingerprint


@pytest.mark.parametrize(
    "other",
    [{"dtype": "bfloat16"}, {"caption_tokens": 40}, {"image_heads": 4}, {"image_size": 13}, {"token_pool": 3}],
    ids=str,
)
def test_every_setting_is_in_the_fingerprint(folder, encoder, other):
    assert BLIP3oNext(str(folder), **SETTINGS | other).fingerprint != encoder.fingerprint


@pytest.mark.parametrize("other", [{"seed": 1}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.5}], ids=str)
def test_the_token_sampler_is_a_variant_that_training_features_do_not_depend_on(folder, encoder, other):
    other_sampler = BLIP3oNext(str(folder), **SETTINGS | other)
    assert other_sampler.fingerprint == encoder.fingerprint
    assert other_sampler.variant != encoder.variant
    assert torch.equal(
        other_sampler.encode_pairs([SHORT], images(1)).context, encoder.encode_pairs([SHORT], images(1)).context
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight;"),
        ({"model.diffusion_connector.2.bias": None}, r"lacks model\.diffusion_connector\.2\.bias;"),
        (
            {"model.vision_tower.vision_tower.bottleneck.regularizer.embedding.weight": None},
            r"lacks model\.vision_tower\.vision_tower\.bottleneck\.regularizer\.embedding\.weight;",
        ),
        ({"model.extra.weight": torch.zeros(1)}, r"holds model\.extra\.weight, which no part"),
        ({"model.norm.weight": torch.zeros(3)}, r"another language model than its config\.json says"),
        (
            {"model.diffusion_connector.2.bias": torch.zeros(3)},
            r"has model\.diffusion_connector\.2\.bias of shape \(3,\), not \(20,\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_missing_surplus_or_of_another_shape_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        BLIP3oNext(str(save_checkpoint(tmp_path, **change)), **SETTINGS)


def test_a_folder_that_is_no_blip3o_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"has no readable config\.json"):
        BLIP3oNext(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 3, "hidden_size": 4}))
    with pytest.raises(ValueError, match="does not say image_start_tag_id, image_start_token_id"):
        BLIP3oNext(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(ValueError, match="no whole set of safetensors"):
        BLIP3oNext(str(tmp_path))


def test_a_file_that_was_cut_is_refused(tmp_path):
    save_checkpoint(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole set of safetensors"):
        BLIP3oNext(str(tmp_path), **SETTINGS)


@pytest.mark.parametrize("name", ["somebody/no-such-model", "/no/such/folder"])
def test_a_model_that_is_not_there_says_what_to_do(name):
    with pytest.raises(ValueError, match=f"pretrained='{name}'.*hf download.*local folder"):
        BLIP3oNext(name)


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    save_checkpoint(tmp_path)
    config = make_config() | {"image_start_token_id": make_config()["image_start_token_id"] - 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"says that <I0> is token \d+, its tokenizer that it is \d+"):
        BLIP3oNext(str(tmp_path), **SETTINGS)


@pytest.mark.parametrize("change", [{"image_size": 24}, {"image_heads": 5}])
def test_settings_of_the_image_tokenizer_must_fit_its_weights(folder, change):
    with pytest.raises(ValueError, match="image tokenizer of 9 patches of 4 pixels and width 16"):
        BLIP3oNext(str(folder), **SETTINGS | change)


def published_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes at full size, written out from the released classes."""
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (217_210, 2048), "model.norm.weight": (2048,)}
    sizes["lm_head.weight"] = (217_210, 2048)
    for i in range(28):
        layer = f"model.layers.{i}."
        for name, shape in {"q": (2048, 2048), "k": (1024, 2048), "v": (1024, 2048), "o": (2048, 2048)}.items():
            sizes[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (6144, 2048), "up": (6144, 2048), "down": (2048, 6144)}.items():
            sizes[f"{layer}mlp.{name}_proj.weight"] = shape
        sizes |= {f"{layer}self_attn.q_norm.weight": (128,), f"{layer}self_attn.k_norm.weight": (128,)}
        sizes |= {f"{layer}input_layernorm.weight": (2048,), f"{layer}post_attention_layernorm.weight": (2048,)}
    images = "model.vision_tower.vision_tower."
    sizes[f"{images}encoder.embeddings.patch_embedding.weight"] = (1152, 3, 14, 14)
    sizes[f"{images}encoder.embeddings.patch_embedding.bias"] = (1152,)
    sizes[f"{images}encoder.embeddings.position_embedding.weight"] = (729, 1152)
    for i in range(27):
        layer = f"{images}encoder.encoder.layers.{i}."
        for name, (out, into) in {
            **{f"self_attn.{n}": (1152, 1152) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "mlp.fc1": (4304, 1152),
            "mlp.fc2": (1152, 4304),
        }.items():
            sizes |= {f"{layer}{name}.weight": (out, into), f"{layer}{name}.bias": (out,)}
        for name in ("layer_norm1", "layer_norm2"):
            sizes |= {f"{layer}{name}.weight": (1152,), f"{layer}{name}.bias": (1152,)}
    for name, out, into in (
        ("encode_task_layer.0", 1152, 1152),
        ("bottleneck.in_linear", 1536, 1152),
        ("bottleneck.regularizer.embedding_proj", 1536, 1536),
    ):
        sizes |= {f"{images}{name}.weight": (out, into), f"{images}{name}.bias": (out,)}
    sizes[f"{images}bottleneck.regularizer.embedding.weight"] = (65_536, 1536)
    connector = "model.diffusion_connector."
    sizes |= {f"{connector}0.weight": (2304, 2048), f"{connector}0.bias": (2304,)}
    sizes |= {f"{connector}2.weight": (2304, 2304), f"{connector}2.bias": (2304,), f"{connector}3.weight": (2304,)}
    return sizes


def test_on_the_meta_device_it_has_its_size_and_no_weights(folder, encoder):
    with torch.device("meta"):
        tiny = BLIP3oNext(str(folder), **SETTINGS)
        full = BLIP3oNext("BLIP3o/BLIP3o-NEXT-SFT-3B")
    assert {p.device.type for part in (tiny, full) for p in part.parameters()} == {"meta"}
    assert {k: v.shape for k, v in tiny.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    assert (full.length, full.width, full.image_size) == (730, 2304, 384)
    assert {p.dtype for p in full.parameters()} == {torch.bfloat16}
    ignored = sum(size_of(v) for k, v in published_names().items() if "encoder.layers.26." in k)
    assert sum(p.numel() for p in full.parameters()) == sum(map(size_of, published_names().values())) - ignored
    with torch.device("meta"), pytest.raises(ValueError, match="not at hand, and of no published size"):
        BLIP3oNext("somebody/no-such-model")


def size_of(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_full_size_names_and_shapes_are_the_published_ones():
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig

    from emf_lightning.text.blip3o_parts import make_connector
    from emf_lightning.text.ta_tok import TextAlignedTokenizer

    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    with torch.device("meta"):
        language = Qwen3ForCausalLM(Qwen3Config(vocab_size=217_210, num_key_value_heads=8, head_dim=128, **sizes))
        images = TextAlignedTokenizer(vision, 65_536, 1536)
        connector = make_connector(2048, 2304)
    parts = {"": language, "model.vision_tower.vision_tower.": images, "model.diffusion_connector.": connector}
    ours = {prefix + k: tuple(v.shape) for prefix, part in parts.items() for k, v in part.state_dict().items()}
    theirs = {k: v for k, v in published_names().items() if not re.search(r"encoder\.encoder\.layers\.26\.", k)}
    assert ours == theirs
    # Qwen3-1.7B without embeddings: "1.4B" on its card; SigLIP2 so400m's tower without head: 428.2M - 15.2M
    backbone = sum(p.numel() for name, p in language.model.named_parameters() if "embed" not in name)
    assert backbone == 1_409_410_048
    place = "model.vision_tower.vision_tower.encoder."
    tower = sum(size_of(v) for k, v in published_names().items() if k.startswith(place))
    assert tower + 2 * 1152 == 428_225_600 - 15_238_352
    assert images.tokens == 729
