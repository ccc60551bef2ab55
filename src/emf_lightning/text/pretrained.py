"""Any published language model as a frozen text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained, unreadable
from emf_lightning.text.base import TextEncoder, TextFeatures
from emf_lightning.text.fingerprint import fingerprint, tokenizer_digest, weights_digest
from emf_lightning.text.truncation import Truncation


class PretrainedTextEncoder(TextEncoder):
    """The hidden states of a transformers model: decoder-only (Qwen3), encoder-only (BERT), an encoder-decoder's
    encoder (T5, whose decoder is not loaded), or the text tower of a model that also sees (CLIP).

    Tokens are padded on the right whatever the tokenizer's own side, padding is masked in the model too, and masked
    positions come out as zeros. Features are computed in ``dtype``, outside any autocast (what is cached must not
    depend on who asked first), and returned as float32. Code from the hub is never run.

    Args:
        model: name on the Hugging Face hub, or a local folder with ``config.json``, safetensors and tokenizer.
        length: L, tokens kept of a caption, special tokens included.
        template: what is encoded; ``{caption}`` stands for the caption, the empty one included.
        layer: which hidden states: -1 is the last one after the final norm, 0 the embeddings, -2 the last but one.
        dtype: of the weights and the arithmetic.
        revision: branch, tag or commit on the hub; name one to be sure of the same features next year.
        subfolder: of a diffusers pipeline's repository, ``text_encoder`` or ``text_encoder_2``; the tokenizer is then
            the one of the same number, ``tokenizer`` or ``tokenizer_2``.
        chat: the template is what a user says in the tokenizer's own chat format, up to where the answer begins.

    Raises:
        ValueError: if the model cannot be loaded, or the template, the length, the layer or the chat make no sense.
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
        if chat and not self.tokenizer.chat_template:
            raise ValueError(
                f"PretrainedTextEncoder: the tokenizer of {model!r} has no chat format; leave chat at false and write "
                "the turns into template"
            )
        self.chat = chat
        self.tower.config.use_cache = False  # keys and values of a decoder: nothing is generated here
        depth = self.tower.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"PretrainedTextEncoder: layer={layer} is none of the {depth + 1} hidden states of {model!r} "
                f"(0 the embeddings ... {depth}, or from the end: -1 ... {-depth - 1})"
            )
        self.width = self.tower.config.hidden_size
        self.length = length
        self.template = template
        self.layer = layer
        self.dtype = dtype
        self._truncation = Truncation(type(self).__name__, length)
        self.freeze()

    @property
    def truncated(self) -> int:
        """Captions that lost their end so far."""
        return self._truncation.cut

    @cached_property
    def fingerprint(self) -> str:
        """A digest of weights, architecture, tokenizer and settings; the folder or name they came from is not part."""
        # What a configuration says about its origin, not about the arithmetic.
        origin = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}
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
            **({"chat": self.tokenizer.chat_template} if self.chat else {}),
        )

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids, at most L and at least one each."""
        texts = [self._text(caption) for caption in captions]
        rows: list[list[int]] = self._ids(texts, self.length)
        full = [text for text, row in zip(texts, rows, strict=True) if len(row) == self.length]
        # Only where one token more is kept when one more is allowed did anything get lost.
        cut = sum(len(row) > self.length for row in self._ids(full, self.length + 1)) if full else 0
        self._truncation.add(len(captions), cut)
        # Many tokenizers make nothing of the null caption: one token of padding stands for it, seen and not masked.
        return [row or [self._padding] for row in rows]

    def _text(self, caption: str) -> str:
        text = self.template.replace("{caption}", caption)
        if not self.chat:
            return text
        turns = [{"role": "user", "content": text}]
        written: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return written

    def _ids(self, texts: list[str], length: int) -> list[list[int]]:
        # the chat format writes the special tokens itself
        special = not self.chat
        return self.tokenizer(texts, truncation=True, max_length=length, padding=False, add_special_tokens=special)[
            "input_ids"
        ]

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
        """Features ``[B, L, D]``, float32, and their mask.

        Raises:
            ValueError: if a feature is not finite, as the T5 and Gemma families' are in float16.
        """
        rows = self._tokenize(captions)
        longest = max(len(row) for row in rows)  # padding up to L is added after the model: it would only cost time
        ids = torch.tensor([row + [self._padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        device = next(self.tower.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device.type, enabled=False):
            states = self._states(ids, mask.long()).float().masked_fill(~mask[..., None], 0.0)
        if not states.isfinite().all():
            raise ValueError(
                f"PretrainedTextEncoder: {type(self.tower).__name__} gives infinite features with "
                f"dtype={self.dtype!r}; use dtype: bfloat16 or float32"
            )
        room = (0, self.length - longest)
        return TextFeatures(nn.functional.pad(states, (0, 0, *room)), nn.functional.pad(mask, room))


def _load(model: str, revision: str | None, dtype: str, subfolder: str | None) -> tuple[Any, Any]:
    """The tokenizer and the text tower; an encoder that can be loaded alone comes without its decoder."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    caller, argument, source = "PretrainedTextEncoder", "model", PretrainedWeights(model, subfolder)
    folder = subfolder or ""
    try:
        beside = folder.replace("text_encoder", "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(model, truncation_side="right", subfolder=beside, **origin)
        kind = AutoConfig.from_pretrained(model, subfolder=folder, **origin).model_type
    except (OSError, ValueError) as error:
        raise unreadable(caller, source, error, argument) from error
    alone = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind, "").endswith("EncoderModel")
    loader = AutoModelForTextEncoding if alone else AutoModel
    how: dict[str, Any] = {"dtype": dtype, "argument": argument, "unused": ("pooler.",)}  # hidden states alone are read
    return tokenizer, load_pretrained(caller, loader, source, frozen=True, part=_text_tower, **how, **origin)


def _text_tower(model: Any) -> Any:
    """The part of ``model`` that reads text."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    for name in ("text_model", "language_model"):
        if hasattr(model, name):
            return _text_tower(getattr(model, name))
    return model
