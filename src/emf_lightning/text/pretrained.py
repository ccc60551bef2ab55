"""Transformers models as frozen text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.files import read_json, to_json
from emf_lightning.pretrained.files import config_of
from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained, on_meta_device, unreadable
from emf_lightning.text.base import TextEncoder, TextFeatures, Truncation
from emf_lightning.text.fingerprint import fingerprint, tokenizer_digest, weights_digest
from emf_lightning.text.plain import neutral, special_tokens

FIXED_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Before a chat template: takes the place of the function that returns today's date."""
_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Models that count positions from behind the padding token's."""
_ALONE = "emf_tower"
"""Key in the configuration of a tower that was saved without the rest of its model: the tower's class."""


class PretrainedTextEncoder(TextEncoder):
    """Hidden states of a transformers model.

    The model may be decoder-only (Qwen3), encoder-only (BERT), an encoder-decoder (T5, without its decoder), or a
    vision-language model with a text tower (CLIP). Tokens are padded on the right, padding is masked in the model too,
    and masked features are zeros. Features are computed in ``dtype``, without autocast, so that cached features do not
    depend on the caller's precision, and returned as float32. Code from the hub is never run.

    Args:
        model: name on the Hugging Face hub, or a local folder with ``config.json``, safetensors and tokenizer.
        length: L, number of tokens kept of a caption, special tokens included.
        template: encoded text; ``{caption}`` is replaced by the caption, which may be empty.
        layer: index of the hidden states: 0 are the embeddings, -1 the last after the final norm, -2 the last but one.
        dtype: of weights and computation.
        revision: branch, tag or commit on the hub; pin one for reproducible features.
        subfolder: for a diffusers pipeline: ``text_encoder`` (with ``tokenizer``) or ``text_encoder_2`` (with
            ``tokenizer_2``).
        chat: wraps the template as a user turn in the tokenizer's chat template, with the generation prompt.

    On the meta device the model has its size and no weights, and there is no tokenizer.

    Raises:
        ValueError: if the model cannot be loaded, or template, length, layer or chat is invalid.
    """

    def __init__(
        self,
        model: str,
        length: int,
        template: str = "{caption}",
        layer: int = -1,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        revision: str | None = None,
        subfolder: str | None = None,
        chat: bool = False,
    ) -> None:
        super().__init__()
        if "{caption}" not in template:
            raise ValueError(f"PretrainedTextEncoder: template={template!r} must contain {{caption}}")
        if length < 1:
            raise ValueError(f"PretrainedTextEncoder: length must be at least 1, got {length}")
        self.tokenizer, self.tower = _load(model, revision, dtype, subfolder)
        planned = self.tokenizer is None
        if chat and not planned and not self.tokenizer.chat_template:
            raise ValueError(
                f"PretrainedTextEncoder: the tokenizer of {model!r} has no chat format; leave chat at false and write "
                "the turns into template"
            )
        self.chat = chat
        self._special = frozenset() if planned else special_tokens(self.tokenizer)
        self.tower.config.use_cache = False  # nothing is generated here
        depth = self.tower.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"PretrainedTextEncoder: layer={layer} is none of the {depth + 1} hidden states of {model!r} "
                f"(0 the embeddings ... {depth}, or from the end: -1 ... {-depth - 1})"
            )
        positions = getattr(self.tower.config, "max_position_embeddings", None)
        if positions is not None and self.tower.config.model_type in _FROM_PADDING:
            positions -= self.tower.config.pad_token_id + 1
        if positions is not None and length > positions:
            raise ValueError(
                f"PretrainedTextEncoder: length={length} is more than the {positions} positions of {model!r}; lower it"
            )
        self.width = self.tower.config.hidden_size
        self.length = length
        self.template = template
        self.layer = layer
        self.dtype = dtype
        self._truncation = Truncation(type(self).__name__, length)
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:
        # entries about the origin, which do not affect the features
        origin = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", _ALONE}
        config = {key: value for key, value in self.tower.config.to_dict().items() if key not in origin}
        return fingerprint(
            encoder=type(self).__name__,
            weights=weights_digest(self.tower),
            config=config,
            tokenizer=tokenizer_digest(self.tokenizer),
            template=self.template,
            dtype=self.dtype,
            length=self.length,
            layer=self.layer,
            **({"chat": self._chat_template} if self.chat else {}),
        )

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The model's, with ``length`` tokens."""
        return (lambda: self.tower(**planned_inputs(self.length)),)

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, between 1 and L."""
        texts = [self._text(caption) for caption in captions]
        sequences: list[list[int]] = self._ids(texts, self.length)
        full = [text for text, ids in zip(texts, sequences, strict=True) if len(ids) == self.length]
        # a caption is truncated if it keeps one more token when one more is allowed
        truncated = sum(len(ids) > self.length for ids in self._ids(full, self.length + 1)) if full else 0
        self._truncation.add(len(captions), truncated)
        # many tokenizers return no token for the null caption: it becomes one padding token, which is not masked
        return [ids or [self._padding] for ids in sequences]

    def _encode_with(self, captions: Sequence[str], **settings: str) -> TextFeatures:
        """``encode`` with other settings for this call alone."""
        kept = {name: getattr(self, name) for name in settings}
        vars(self).update(settings)
        try:
            return self.encode(captions)
        finally:
            vars(self).update(kept)

    def _text(self, caption: str) -> str:
        text = self.template.replace("{caption}", neutral(caption, self._special))
        if not self.chat:
            return text
        turns = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self._chat_template, tokenize=False, add_generation_prompt=True
        )

    @property
    def _chat_template(self) -> str:
        """The tokenizer's, on a fixed day: some write today's date into the text, so that features changed daily."""
        template: str = self.tokenizer.get_chat_template()
        return FIXED_DAY + template if "strftime_now" in template else template

    def _ids(self, texts: list[str], length: int) -> list[list[int]]:
        special = not self.chat  # the chat template contains them
        return self.tokenizer(texts, truncation=True, max_length=length, add_special_tokens=special)["input_ids"]

    @property
    def _padding(self) -> int:
        names = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
        return next((i for name in names if (i := getattr(self.tokenizer, name)) is not None), 0)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``[B, tokens, D]`` of ``layer``."""
        if self.layer == -1:
            return self.tower(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.tower(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]``, float32; ValueError if they are not finite, as with T5 and Gemma in float16."""
        states, mask = self._padded_states(self._tokenize(captions))
        padding = (0, self.length - mask.shape[1])
        return TextFeatures(nn.functional.pad(states, (0, 0, *padding)), nn.functional.pad(mask, padding))

    def _padded_states(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, n, D]``, float32, zero where masked, and mask ``[B, n]``; n is the longest length."""
        device = next(self.tower.parameters()).device
        longest = max(map(len, sequences))  # padding up to L is added after the model, to save time
        ids = torch.tensor([ids + [self._padding] * (longest - len(ids)) for ids in sequences], device=device)
        lengths = torch.tensor([[len(ids)] for ids in sequences], device=device)
        mask = torch.arange(longest, device=device) < lengths
        with torch.autocast(device.type, enabled=False):
            states = self._states(ids, mask.long()).float().masked_fill(~mask[..., None], 0.0)
        if not states.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}: {type(self.tower).__name__} gives infinite features with "
                f"dtype={self.dtype!r}; use dtype: bfloat16 or float32"
            )
        return states, mask


def planned_inputs(length: int) -> dict[str, Tensor]:
    """Inputs of a transformers model on the meta device; of a mask ``[1, 1, L, L]`` it does not read the numbers."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")}


def _load(model: str, revision: str | None, dtype: str, subfolder: str | None) -> tuple[Any, Any]:
    """The tokenizer and the text tower; an encoder that can be loaded alone comes without its decoder.

    On the meta device there is no tokenizer.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    caller, argument, source = "PretrainedTextEncoder", "model", PretrainedWeights(model, subfolder)
    folder = subfolder or ""
    if on_meta_device():
        try:
            config = AutoConfig.for_model(**config_of(model, subfolder))
        except OSError as error:
            raise unreadable(caller, source, error, argument) from error
        alone = _saved_alone(config)
        with torch.device("meta"):
            tower = alone(config) if alone else _text_tower(AutoModel.from_config(config))
        return None, tower.to(getattr(torch, dtype))
    try:
        beside = folder.replace("text_encoder", "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source.path, truncation_side="right", subfolder=beside, **origin)
        config = AutoConfig.from_pretrained(source.path, subfolder=folder, **origin)
    except (OSError, ValueError) as error:
        raise unreadable(caller, source, error, argument) from error
    how: dict[str, Any] = {"dtype": dtype, "argument": argument, "unused": ("pooler.",)}  # hidden states alone are read
    how |= {"frozen": True, **origin}
    if alone := _saved_alone(config):
        return tokenizer, load_pretrained(caller, alone, source, **how)
    kind = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "")
    loader = AutoModelForTextEncoding if kind.endswith("EncoderModel") else AutoModel
    return tokenizer, load_pretrained(caller, loader, source, part=_text_tower, **how)


def save_tower(encoder: PretrainedTextEncoder, folder: Path) -> None:
    """Writes the tower and its tokenizer into a folder that ``PretrainedTextEncoder`` reads as its ``model``."""
    encoder.tower.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(to_json(read_json(file, "save it again") | {_ALONE: type(encoder.tower).__name__}))


def _saved_alone(config: Any) -> Any:
    """The class of a tower that ``save_tower`` wrote, which the Auto classes may not know; None for another model."""
    if (name := getattr(config, _ALONE, None)) is None:
        return None
    return getattr(import_module(type(config).__module__.replace("configuration", "modeling")), name)


def _text_tower(model: Any) -> Any:
    """The part of ``model`` that reads text."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    for name in ("text_model", "language_model"):
        if hasattr(model, name):
            return _text_tower(getattr(model, name))
    return model
