"""Text encoders of Stable Diffusion 1.x and 3, as in their pipelines: no position is masked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.pretrained.loading import PretrainedWeights, load_pretrained, on_meta_device, unreadable
from emf_lightning.text.base import TextEncoder, TextFeatures, Truncation
from emf_lightning.text.fingerprint import fingerprint, tokenizer_digest, weights_digest
from emf_lightning.text.plain import neutral, special_tokens

CLIP_LENGTH = 77


class StableDiffusionTextEncoder(TextEncoder):
    """Text encoder of Stable Diffusion 1.x: last hidden states of CLIP ViT-L/14 at all 77 positions.

    The mask is True everywhere, because the network was trained to attend to padding as well.

    Args:
        pretrained: folder or hub name of a pipeline with ``tokenizer`` and ``text_encoder``.
        dtype: of weights and computation; features are float32.

    Raises:
        ValueError: if the weights or tokenizers cannot be loaded.
    """

    builds_on_meta = True

    def __init__(self, pretrained: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
        from transformers import CLIPTextModel

        super().__init__()
        self.dtype = dtype
        self.tower = _tower(self, CLIPTextModel, pretrained, "text_encoder", dtype)
        self.tokenizer = _tokenizer(self, pretrained, "tokenizer")
        self.width, self.length = self.tower.config.hidden_size, CLIP_LENGTH
        self._truncation = Truncation(type(self).__name__, CLIP_LENGTH)
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self, [self.tower], [self.tokenizer], self.dtype)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, 77, D]``, float32; no position is masked."""
        ids = _padded(self.tokenizer, captions, CLIP_LENGTH, self._truncation)
        device = next(self.tower.parameters()).device
        with torch.autocast(device.type, enabled=False):
            context = self.tower(ids.to(device)).last_hidden_state.float()
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool, device=device))


class SD3TextEncoder(TextEncoder):
    """The three text encoders of Stable Diffusion 3 (arXiv 2403.03206): two CLIPs and T5-XXL.

    Token 0 is the pooled features of both CLIPs, tokens 1 to 77 are the CLIPs' penultimate hidden states concatenated
    along the channels, the rest are T5's. Narrower tokens are padded with zeros. No position is masked, because the
    network was trained to attend to padding as well.

    Args:
        pretrained: folder or hub name of a pipeline with three tokenizers and text encoders.
        t5_length: T5 tokens a caption; 256 in the pipeline, 77 in training.
        dtype: of weights and computation; features are float32. float16 overflows in T5.

    Raises:
        ValueError: if the weights or tokenizers cannot be loaded.
    """

    builds_on_meta = True

    def __init__(
        self, pretrained: str, t5_length: int = 256, dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ) -> None:
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        super().__init__()
        if t5_length < 1:
            raise ValueError(f"SD3TextEncoder: t5_length must be at least 1, got {t5_length}")
        self.dtype = dtype
        kinds = {"": CLIPTextModelWithProjection, "_2": CLIPTextModelWithProjection, "_3": T5EncoderModel}
        towers = [_tower(self, kind, pretrained, f"text_encoder{name}", dtype) for name, kind in kinds.items()]
        self.towers = nn.ModuleList(towers)
        self.tokenizers = [_tokenizer(self, pretrained, f"tokenizer{name}") for name in kinds]
        self.t5_length = t5_length
        t5: Any = self.towers[2]
        self.width: int = t5.config.d_model
        self.length = 1 + CLIP_LENGTH + t5_length
        self._truncation = Truncation(type(self).__name__, t5_length)  # CLIP's 77 tokens truncate more
        self._clip_truncation = Truncation(f"{type(self).__name__} (its CLIPs)", CLIP_LENGTH)
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self, self.towers, self.tokenizers, self.dtype, t5_length=self.t5_length)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, 1 + 77 + t5_length, D]``, float32; no position is masked."""
        device = next(self.towers.parameters()).device
        clip, clip_2, t5 = zip(self.tokenizers, self.towers, strict=True)
        pooled, states = [], []
        with torch.autocast(device.type, enabled=False):
            for (tokenizer, tower), truncation in ((clip, self._clip_truncation), (clip_2, None)):
                ids = _padded(tokenizer, captions, CLIP_LENGTH, truncation)
                output = tower(ids.to(device), output_hidden_states=True)
                pooled.append(output.text_embeds.float()[:, None])
                states.append(output.hidden_states[-2].float())
            ids = _padded(t5[0], captions, self.t5_length, self._truncation)
            tokens = t5[1](ids.to(device)).last_hidden_state.float()
        clips = [torch.cat(parts, dim=-1) for parts in (pooled, states)]
        clips = [nn.functional.pad(features, (0, self.width - features.shape[-1])) for features in clips]
        context = torch.cat([*clips, tokens], dim=1)
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool, device=device))


def _padded(tokenizer: Any, captions: Sequence[str], length: int, truncation: Truncation | None) -> Tensor:
    """Token ids ``[B, length]``, padded and truncated; truncated captions are counted."""
    special = special_tokens(tokenizer)
    captions = [neutral(caption, special) for caption in captions]
    if truncation is not None:
        whole = tokenizer(captions, padding=False, truncation=False)["input_ids"]
        truncation.add(len(captions), sum(len(row) > length for row in whole))
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def _tower(encoder: TextEncoder, kind: Any, pretrained: str, subfolder: str, dtype: str) -> Any:
    source = PretrainedWeights(pretrained, subfolder)
    return load_pretrained(type(encoder).__name__, kind, source, frozen=True, dtype=dtype)


def _tokenizer(encoder: TextEncoder, pretrained: str, subfolder: str) -> Any:
    from transformers import AutoTokenizer

    if on_meta_device():
        return None  # nothing is encoded there
    try:
        return AutoTokenizer.from_pretrained(pretrained, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise unreadable(type(encoder).__name__, PretrainedWeights(pretrained, subfolder), error) from error


def _fingerprint(encoder: TextEncoder, towers: Any, tokenizers: Sequence[Any], dtype: str, **settings: Any) -> str:
    return fingerprint(
        encoder=type(encoder).__name__,
        weights=[weights_digest(tower) for tower in towers],
        tokenizers=[tokenizer_digest(tokenizer) for tokenizer in tokenizers],
        dtype=dtype,
        **settings,
    )
