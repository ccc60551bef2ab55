"""Text encoders of Stable Diffusion 1.x and 3 and of FLUX.1, as in their pipelines: no position is masked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
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

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """CLIP's."""
        return (lambda: self.tower(_no_ids(CLIP_LENGTH)),)

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, 77, D]``, float32; no position is masked."""
        ids = _padded(self.tokenizer, captions, CLIP_LENGTH, self._truncation)
        device = next(self.tower.parameters()).device
        with torch.autocast(device.type, enabled=False):
            context = self.tower(ids.to(device)).last_hidden_state.float()
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool, device=device))


class _ClipsAndT5(TextEncoder):
    """Base of the text encoders of pipelines with CLIPs and T5: pooled features first, T5's tokens last.

    Narrower tokens are padded with zeros. No position is masked, because the network was trained to attend to padding
    as well.
    """

    def __init__(self, pretrained: str, clip: Any, clips: int, before: int, t5_length: int, dtype: str) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        if t5_length < 1:
            raise ValueError(f"{type(self).__name__}: t5_length must be at least 1, got {t5_length}")
        self.dtype = dtype
        kinds = dict(zip(("", "_2", "_3"), [clip] * clips + [T5EncoderModel], strict=False))
        towers = [_tower(self, kind, pretrained, f"text_encoder{name}", dtype) for name, kind in kinds.items()]
        self.towers = nn.ModuleList(towers)
        self.tokenizers = [_tokenizer(self, pretrained, f"tokenizer{name}") for name in kinds]
        self.t5_length = t5_length
        t5: Any = self.towers[-1]
        self.width: int = t5.config.d_model
        self.length = before + t5_length
        self._truncation = Truncation(type(self).__name__, t5_length)  # CLIP's 77 tokens truncate more
        self._clip_truncation = Truncation(f"{type(self).__name__} (CLIP)", CLIP_LENGTH)
        self.freeze()

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self, self.towers, self.tokenizers, self.dtype, t5_length=self.t5_length)

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The CLIPs' and T5's."""
        lengths = [CLIP_LENGTH] * (len(self.towers) - 1) + [self.t5_length]
        return (lambda: [tower(_no_ids(n)) for tower, n in zip(self.towers, lengths, strict=True)],)

    @abstractmethod
    def _before_t5(self, outputs: list[Any]) -> list[Tensor]:
        """Tokens ``[B, n, D]``, from the CLIPs' outputs."""

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]``, float32; no position is masked."""
        device = next(self.towers.parameters()).device
        *clips, (t5_tokenizer, t5) = zip(self.tokenizers, self.towers, strict=True)
        outputs = []
        with torch.autocast(device.type, enabled=False):
            for i, (tokenizer, tower) in enumerate(clips):
                ids = _padded(tokenizer, captions, CLIP_LENGTH, None if i else self._clip_truncation)
                outputs.append(tower(ids.to(device), output_hidden_states=True))
            ids = _padded(t5_tokenizer, captions, self.t5_length, self._truncation)
            tokens = [*self._before_t5(outputs), t5(ids.to(device)).last_hidden_state]
        context = torch.cat([nn.functional.pad(each.float(), (0, self.width - each.shape[-1])) for each in tokens], 1)
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool, device=device))


class SD3TextEncoder(_ClipsAndT5):
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

    def __init__(
        self, pretrained: str, t5_length: int = 256, dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ) -> None:
        from transformers import CLIPTextModelWithProjection

        super().__init__(pretrained, CLIPTextModelWithProjection, 2, 1 + CLIP_LENGTH, t5_length, dtype)

    def _before_t5(self, outputs: list[Any]) -> list[Tensor]:
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return [pooled[:, None], torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)]


class FluxTextEncoder(_ClipsAndT5):
    """The two text encoders of FLUX.1: CLIP ViT-L/14 and T5-XXL.

    Token 0 is CLIP's pooled features, padded with zeros, the rest are T5's hidden states. No position is masked,
    because the network was trained to attend to padding as well.

    Args:
        pretrained: folder or hub name of a pipeline with two tokenizers and text encoders.
        t5_length: T5 tokens a caption; 512 in dev's pipeline, at most 256 in schnell's.
        dtype: of weights and computation; features are float32. float16 overflows in T5.

    Raises:
        ValueError: if the weights or tokenizers cannot be loaded.
    """

    def __init__(
        self, pretrained: str, t5_length: int = 512, dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ) -> None:
        from transformers import CLIPTextModel

        super().__init__(pretrained, CLIPTextModel, 1, 1, t5_length, dtype)

    def _before_t5(self, outputs: list[Any]) -> list[Tensor]:
        return [outputs[0].pooler_output[:, None]]


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


def _no_ids(length: int) -> Tensor:
    return torch.zeros(1, length, dtype=torch.long, device="meta")


def _tower(encoder: TextEncoder, kind: Any, pretrained: str, subfolder: str, dtype: str) -> Any:
    source = PretrainedWeights(pretrained, subfolder)
    return load_pretrained(type(encoder).__name__, kind, source, frozen=True, dtype=dtype)


def _tokenizer(encoder: TextEncoder, pretrained: str, subfolder: str) -> Any:
    from transformers import AutoTokenizer

    if on_meta_device():
        return None  # nothing is encoded there
    source = PretrainedWeights(pretrained, subfolder)
    try:
        return AutoTokenizer.from_pretrained(source.path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise unreadable(type(encoder).__name__, source, error) from error


def _fingerprint(encoder: TextEncoder, towers: Any, tokenizers: Sequence[Any], dtype: str, **settings: Any) -> str:
    return fingerprint(
        encoder=type(encoder).__name__,
        weights=[weights_digest(tower) for tower in towers],
        tokenizers=[tokenizer_digest(tokenizer) for tokenizer in tokenizers],
        dtype=dtype,
        **settings,
    )
