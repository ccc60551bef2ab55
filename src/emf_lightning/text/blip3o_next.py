"""BLIP3o-NEXT as a frozen text encoder: hidden states of a language model at image tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emf_lightning.text.base import NULL_CAPTION, TextEncoder, TextFeatures, Truncation
from emf_lightning.text.blip3o_checkpoint import CONNECTOR, IMAGES, LANGUAGE, BLIP3oCheckpoint
from emf_lightning.text.blip3o_parts import (
    load_language_model,
    load_tokenizer,
    make_connector,
    qwen_config,
    vision_config,
)
from emf_lightning.text.fingerprint import fingerprint, tokenizer_digest, weights_digest
from emf_lightning.text.plain import neutral, special_tokens
from emf_lightning.text.pretrained import planned_inputs
from emf_lightning.text.ta_tok import TextAlignedTokenizer
from emf_lightning.text.token_sampling import TokenSampler

QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nPlease generate image based on the following caption: {caption}"
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""Chat prompt up to the image tokens: ``QUESTION`` is truncated to ``caption_tokens``, ``ANSWER`` never."""


class BLIP3oNext(TextEncoder):
    """BLIP3o-NEXT (arXiv 2510.15857): its language model's hidden states at image tokens, through its connector.

    An image is 730 tokens of the language model's vocabulary: one for its scale, 729 for its patches. In training the
    checkpoint's image tokenizer computes them from the target image (``encode_pairs``); for sampling the language model
    generates them (``encode``). Generated tokens are a function of ``seed`` and the caption, so that a caption has one
    set of features; another seed gives other tokens for the same caption. The null condition is the connector's output
    for zero hidden states, as in training (not zeros), and no position is masked.

    Differences to the released code: it attends to padding in batches of more than one prompt, its training reads the
    last 730 positions of the sequence, which start three after the image's, and it may sample tokens that are no image
    tokens.

    Args:
        pretrained: name on the Hugging Face hub, or local folder with ``config.json``, safetensors and tokenizer.
        dtype: of weights and computation; the image tokenizer compares codebook entries in float32.
        top_p: nucleus probability among the ``top_k`` likeliest tokens; the released inference uses 0.95 and 1200.
        top_k: number of the likeliest tokens that are sampled from.
        temperature: divides the logits.
        seed: of token sampling.
        token_pool: averages features over squares of this many patches a side, 3 or 9 of the 27: 730 tokens become 82
            or 10, and their cache shrinks accordingly. The network was not trained on averages; ``emf cache`` measures
            their error.
        caption_tokens: tokens kept of a caption and the instruction before it.
        batch_size: captions for which tokens are generated together; each takes 0.1 GB for keys and values.
        compiled: compiles the step that generates one token, with a static KV cache; worth it for hundreds of captions.
        image_size: side of the tokenized images; SigLIP2's default, as the checkpoint does not state it.
        image_heads: attention heads of the image tokenizer; likewise.
        revision: branch, tag or commit on the hub; pin one for reproducible features.

    On the meta device the encoder has the published size and no weights.

    Raises:
        ValueError: if the checkpoint cannot be loaded, or its tensors or tokenizer do not match.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        top_p: float = 0.95,
        top_k: int = 1200,
        temperature: float = 1.0,
        seed: int = 0,
        token_pool: int = 1,
        caption_tokens: int = 512,
        batch_size: int = 16,
        compiled: bool = False,
        image_size: int = 384,
        image_heads: int = 16,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("caption_tokens", caption_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"BLIP3oNext: {name} must be at least 1, got {value}")
        self.dtype = dtype
        self.sampler = TokenSampler(top_k, top_p, temperature, seed)
        self.caption_tokens = caption_tokens
        self.batch_size = batch_size
        self.compiled = compiled
        checkpoint = BLIP3oCheckpoint(pretrained, revision)
        config = checkpoint.config
        self.codes = config["num_image_tokens"]
        self.first_code = config["image_start_token_id"]
        self.opening = [config["image_start_tag_id"], config["scale_start_token_id"]]
        self.tokenizer: Any = None if checkpoint.planned else load_tokenizer(checkpoint)
        self._load_models(checkpoint, image_size, image_heads)
        self.image_size, self.image_tokens = image_size, self.images.tokens
        side = math.isqrt(self.images.tokens)
        if token_pool < 1 or side % token_pool:
            raise ValueError(f"BLIP3oNext: token_pool={token_pool} does not divide the {side} patches along a side")
        self.token_pool = token_pool
        self.length = 1 + self.images.tokens // token_pool**2
        self.width = len(self._weight)
        self._truncation = Truncation(type(self).__name__, caption_tokens)
        self._static_cache: tuple[tuple[int, int], Any] = ((0, 0), None)
        self.freeze()

    def _load_models(self, checkpoint: BLIP3oCheckpoint, image_size: int, image_heads: int) -> None:
        from transformers import Qwen3ForCausalLM

        dtype: torch.dtype = getattr(torch, self.dtype)
        vision = vision_config(checkpoint, image_size, image_heads)
        width = checkpoint.shapes.get(f"{CONNECTOR}0.weight", (2304,))[0]
        code_width = checkpoint.shapes.get(f"{IMAGES}bottleneck.in_linear.weight", (1536,))[0]
        with torch.device("meta"):  # names and shapes first
            language = Qwen3ForCausalLM(qwen_config(checkpoint.config))
        self.images = TextAlignedTokenizer(vision, self.codes, code_width)
        self.connector = make_connector(checkpoint.config["hidden_size"], width)
        if checkpoint.planned:
            self.language = language
            self.to(dtype)
            return
        last = f"{IMAGES}encoder.encoder.layers.{vision.num_hidden_layers - 1}."
        parts = {LANGUAGE: language, IMAGES: self.images, CONNECTOR: self.connector}
        checkpoint.check(
            (prefix + name for prefix, part in parts.items() for name in part.state_dict()),
            optional=[name for name in checkpoint.shapes if name.startswith(last)]
            + ["lm_head.weight"] * checkpoint.config.get("tie_word_embeddings", False),
        )
        self.language = load_language_model(checkpoint, language.config, dtype)
        checkpoint.fill(self.images, IMAGES, dtype)
        checkpoint.fill(self.connector, CONNECTOR, dtype)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(
            encoder=type(self).__name__,
            weights=weights_digest(self),
            heads=[self.images.heads, self.language.config.num_attention_heads],
            rope=[self.language.config.to_dict().get(key) for key in ("rope_parameters", "rope_theta")],
            epsilon=self.language.config.rms_norm_eps,
            tokenizer=tokenizer_digest(self.tokenizer),
            image_size=self.images.side,
            chat=[QUESTION, ANSWER, self.opening, self.first_code],
            dtype=self.dtype,
            caption_tokens=self.caption_tokens,
            token_pool=self.token_pool,
        )

    @property
    def variant(self) -> str:
        """The token sampler: it affects generated tokens, but not the features of ``encode_pairs``."""
        return str(self.sampler)

    # -- features from generated tokens, or from an image ------------------------------------------------------------

    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features ``[B, L, D]``, float32, at image tokens that the language model generates."""
        parts = []
        for start in range(0, len(captions), self.batch_size):
            batch = captions[start : start + self.batch_size]
            states = self._weight.new_zeros(len(batch), 1 + self.images.tokens, self._weight.shape[1])
            captioned = [index for index, caption in enumerate(batch) if caption != NULL_CAPTION]
            if captioned:
                states[captioned] = self.generate([batch[index] for index in captioned])[1]
            parts.append(self._features(states))
        return TextFeatures.cat(parts)

    def encode_pairs(self, captions: Sequence[str], images: Tensor) -> TextFeatures:
        """Features ``[B, L, D]``, float32, at the tokens of ``images`` ``[B, 3, S, S]`` in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self._features(self.hidden_states(captions, self.images(images)))

    def planned_passes(self) -> tuple[Callable[[], object], ...]:
        """The image tokenizer's, then the language model's, behind a prompt of 128 tokens, and the connector's."""
        images = torch.empty(1, 3, self.images.side, self.images.side, device="meta")
        inputs = planned_inputs(128 + 1 + self.images.tokens)
        states = torch.empty(1, 1 + self.images.tokens, self._weight.shape[1], dtype=self._weight.dtype, device="meta")
        self.images(images)  # computes the codebook, once a device

        def language() -> None:
            self.language.model(**inputs, use_cache=False)
            self.connector(states)

        return lambda: self.images(images), language

    @property
    def _weight(self) -> Tensor:
        """The connector's first weight ``[D, H]``, for its width, dtype and device."""
        return next(self.connector.parameters())

    def _features(self, states: Tensor) -> TextFeatures:
        """The connector's output for hidden states ``[B, 730, H]``."""
        with torch.autocast(states.device.type, enabled=False):
            context = pool_tokens(self.connector(states).float(), self.token_pool)
        if not context.isfinite().all():
            raise ValueError(
                f"BLIP3oNext: the features are not finite with dtype={self.dtype!r}; use dtype: bfloat16 or float32"
            )
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))

    @torch.no_grad()
    def hidden_states(self, captions: Sequence[str], codes: Tensor) -> Tensor:
        """Last hidden states ``[B, 730, H]`` at the scale token and at given ``codes`` ``[B, 729]``."""
        ids, mask, positions = self._prompts(captions)
        ids = torch.cat([ids, codes + self.first_code], dim=1)
        mask = nn.functional.pad(mask, (0, codes.shape[1]), value=True)
        positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(codes.shape[1], device=ids.device)], 1)
        states = self.language.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        # prompts are padded on the left, so that all images end together
        return states.last_hidden_state[:, -codes.shape[1] - 1 :]

    @torch.inference_mode(False)  # the static KV cache outlives a validation
    @torch.no_grad()
    def generate(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Generated codes ``[B, 729]``, and last hidden states ``[B, 730, H]`` at the scale token and the codes.

        Autoregressive with a KV cache, one step a token.
        """
        steps = self.images.tokens
        ids, mask, positions = self._prompts(captions)
        start = ids.shape[1]
        cache = self._cache(len(ids), start + steps)
        step = self._compiled_step if self.compiled else self._step
        head = self.language.lm_head.weight[self.first_code : self.first_code + self.codes]
        uniforms = self.sampler.uniforms(captions, steps).to(ids.device)
        mask = nn.functional.pad(mask, (0, steps), value=True).long()
        states, codes, position = [], [], positions[:, -1:]
        with torch.autocast(ids.device.type, enabled=False):
            state = self._step(ids, mask if self.compiled else mask[:, :start], positions, cache)[:, -1:]
            for number in range(steps):
                states.append(state)
                codes.append(self.sampler.sample(state[:, 0] @ head.T, uniforms[:, number]))
                position = position + 1
                seen = mask if self.compiled else mask[:, : start + number + 1]
                state = step(codes[-1][:, None] + self.first_code, seen, position, cache)
                state = state.clone() if self.compiled else state  # the next step of a CUDA graph overwrites it
        return torch.stack(codes, dim=1), torch.cat([*states, state], dim=1)

    def _step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Last hidden states of ``ids`` ``[B, n]`` after those in ``cache``, which they are added to."""
        output = self.language.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state

    @cached_property
    def _compiled_step(self) -> Callable[..., Tensor]:
        return torch.compile(self._step, dynamic=False, mode="reduce-overhead")

    def _cache(self, batch_size: int, tokens: int) -> Any:
        """KV cache; a compiled step reuses the previous static cache if it has the same size."""
        from transformers import DynamicCache, StaticCache

        if not self.compiled:
            return DynamicCache(config=self.language.config)
        if self._static_cache[0] == (batch_size, tokens):
            self._static_cache[1].reset()
        else:
            self._static_cache = (batch_size, tokens), StaticCache(config=self.language.config, max_cache_len=tokens)
        return self._static_cache[1]

    @cached_property
    def _special(self) -> frozenset[str]:
        return special_tokens(self.tokenizer)

    def _prompts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and positions ``[B, n]`` of the prompt before the codes, padded on the left."""
        questions = [QUESTION.replace("{caption}", neutral(caption, self._special)) for caption in captions]
        sequences: list[list[int]] = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        self._truncation.add(len(sequences), sum(len(sequence) > self.caption_tokens for sequence in sequences))
        # tokenized apart from the question, so that a long caption does not truncate it; no token spans both
        answer: list[int] = self.tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + self.opening
        sequences = [sequence[: self.caption_tokens] + answer for sequence in sequences]
        longest = max(map(len, sequences))
        if self.compiled:  # few different sizes, as each is compiled anew
            longest = -(-longest // 64) * 64
        device = self._weight.device
        ids = torch.tensor([[0] * (longest - len(sequence)) + sequence for sequence in sequences], device=device)
        lengths = torch.tensor([[len(sequence)] for sequence in sequences], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def pool_tokens(context: Tensor, pool: int) -> Tensor:
    """Averages squares of ``pool`` x ``pool`` patches in features ``[B, 1 + n n, D]``; keeps the scale token."""
    if pool == 1:
        return context
    scale, patches = context[:, :1], context[:, 1:]
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # type: ignore[no-untyped-call]
    return torch.cat([scale, nn.functional.avg_pool2d(grid, pool).flatten(2).transpose(1, 2)], dim=1)
