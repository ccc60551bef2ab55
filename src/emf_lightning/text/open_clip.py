"""OpenCLIP text towers as frozen text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.pretrained.loading import on_meta_device
from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures, Truncation
from emf_lightning.text.fingerprint import fingerprint, tokenizer_digest, weights_digest
from emf_lightning.text.plain import neutral, special_tokens


class OpenClipTextEncoder(TextEncoder):
    """Token features of an OpenCLIP text tower, after the final norm, before pooling and projection.

    The tower reads all its positions, padding included, as in its training. The mask is True up to the end-of-text
    token; features beyond it are zeros. Features are computed in ``dtype``, without autocast, and returned as float32.

    Args:
        model: OpenCLIP's name of the architecture ("ViT-L-14"); "hf-hub:..." and "local-dir:..." bring their weights.
        pretrained: path of a local checkpoint, or a tag of OpenCLIP's ("openai", "laion2b_s32b_b82k").
        length: L; at most the tower's context length, which is the default.
        template: encoded text; ``{caption}`` is replaced by the caption, which may be empty.
        dtype: of weights and computation.
        quick_gelu: activation is QuickGELU. Implied by OpenCLIP's tags; set it for a local file of OpenAI's weights,
            which give plausible but wrong features without it.

    On the meta device the tower has its size and no weights.

    Raises:
        ValueError: if the model cannot be loaded, or the template or the length is invalid.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        length: int | None = None,
        template: str = "{caption}",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        if "{caption}" not in template:
            raise ValueError(f"OpenClipTextEncoder: template={template!r} must contain {{caption}}")
        self.tower, tokenizer, self._architecture = _load(model, pretrained, quick_gelu)
        self.tokenizer = literal(tokenizer)
        self._inner = getattr(tokenizer, "tokenizer", None)  # of transformers; None for OpenAI's tokenizer
        self._padding = 0 if self._inner is None else self._inner.pad_token_id
        self.tower.to(getattr(torch, dtype))
        self.template = template
        self.dtype = dtype
        self._context = min(self.tokenizer.context_length, self.tower.context_length)
        self._kept = self._context if length is None else length
        if not 1 <= self._kept <= self._context:
            raise ValueError(f"OpenClipTextEncoder: length={length} must be between 1 and {model!r}'s {self._context}")
        self.freeze()
        # towers differ in the tokens they return (a Hugging Face tower may drop its class token): run it once
        tokens = self._tokens(self._ids([NULL_CAPTION], self._kept))
        self.length, self.width = min(self._kept, tokens.shape[1]), tokens.shape[2]
        self._truncation = Truncation(type(self).__name__, self._kept)

    @cached_property
    def fingerprint(self) -> str:
        vocabulary = tokenizer_digest(self._inner) if self._inner else fingerprint(vocabulary=self.tokenizer.encoder)
        return fingerprint(
            encoder=type(self).__name__,
            weights=weights_digest(self.tower),
            architecture=self._architecture,
            tokenizer=vocabulary,
            template=self.template,
            dtype=self.dtype,
            length=self.length,
        )

    def _ids(self, captions: Sequence[str], length: int) -> Tensor:
        texts = [self.template.replace("{caption}", caption) for caption in captions]
        return self.tokenizer(texts, context_length=length)

    def _mask(self, ids: Tensor) -> Tensor:
        """True for the caption's tokens, up to and including end of text."""
        if self._inner is None:
            # OpenAI's tokenizer pads with 0, which is also "!": only end of text marks the end
            ends = (ids == self.tokenizer.eot_token_id).int().argmax(dim=1, keepdim=True)
            return torch.arange(ids.shape[1]) <= ends
        mask = ids != self._padding
        if self._padding == self._inner.eos_token_id:  # the first of them is end of text
            mask[:, 1:] |= mask[:, :-1].clone()
            mask[:, 0] = True
        return mask

    @torch.no_grad()
    def _tokens(self, ids: Tensor) -> Tensor:
        """Token features at all positions of the tower: its causal mask has a fixed size."""
        device = next(self.tower.parameters()).device
        ids = nn.functional.pad(ids, (0, self._context - ids.shape[1]), value=self._padding)
        on_meta = device.type == "meta"  # which has no autocast
        with nullcontext() if on_meta else torch.autocast(device.type, enabled=False):
            return self.tower(ids.to(device))[1].float()

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The tower's."""
        ids = torch.zeros(1, self._context, dtype=torch.long, device="meta")
        return (lambda: self._tokens(ids),)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        ids = self._ids(captions, self._kept)
        mask = self._mask(ids)
        full = [caption for caption, last in zip(captions, mask[:, -1].tolist(), strict=True) if last]
        # a caption is truncated if it keeps one more token when one more is allowed
        truncated = int(self._mask(self._ids(full, self._kept + 1))[:, -1].sum()) if full else 0
        self._truncation.add(len(captions), truncated)
        tokens = self._tokens(ids)
        first = self._context - tokens.shape[1]  # 1 if the tower drops its class token, else 0
        tokens = tokens[:, : self.length]
        mask = nn.functional.pad(mask[:, first:], (0, first))[:, : self.length].to(tokens.device)
        return TextFeatures(tokens.masked_fill(~mask[..., None], 0.0), mask)


def literal(tokenizer: Any) -> Any:
    """An OpenCLIP tokenizer, changed so that texts like ``<end_of_text>`` are words, and not the end of a caption."""
    import regex  # type: ignore[import-untyped]  # OpenCLIP's

    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        special = "".join(f"{tokenizer.decoder[index]}|" for index in tokenizer.all_special_ids)
        tokenizer.pat = regex.compile(tokenizer.pat.pattern.removeprefix(special), regex.IGNORECASE)
    elif clean := getattr(tokenizer, "clean_fn", None):  # afterwards: it makes "</s>" of "&lt;/s&gt;"
        tokenizer.clean_fn = partial(_cleaned, clean, special_tokens(inner))
    return tokenizer


def _cleaned(clean: Callable[[str], str], special: frozenset[str], text: str) -> str:
    return neutral(clean(text), special)


def _load(model: str, pretrained: str | None, quick_gelu: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Text tower, tokenizer, and the settings of the architecture."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tag = get_pretrained_cfg(model.replace("/", "-"), pretrained) if pretrained else {}
    quick_gelu = quick_gelu or pretrained == "openai" or tag.get("quick_gelu", False)
    try:
        whole = open_clip.create_model(
            model,
            None if on_meta_device() else pretrained,
            load_weights=not on_meta_device(),
            force_quick_gelu=quick_gelu,
            force_custom_text=True,  # the text tower as a module of its own
            require_pretrained=not on_meta_device(),
            device="meta" if on_meta_device() else "cpu",
        )
        tokenizer = open_clip.get_tokenizer(model)
        config = open_clip.get_model_config(model.replace("/", "-") if ":" not in model else model)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"OpenClipTextEncoder: cannot load model={model!r} with pretrained={pretrained!r} ({reason}); give a name "
            "of open_clip.list_models() and the path of a local checkpoint, or a tag of "
            "open_clip.list_pretrained_tags_by_model(name) while online"
        ) from error
    whole.text.output_tokens = True
    return whole.text, tokenizer, {"text": config["text_cfg"], "quick_gelu": quick_gelu or config.get("quick_gelu")}
