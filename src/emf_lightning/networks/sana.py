"""SANA (diffusers' ``SanaTransformer2DModel``) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from emf_lightning.networks.adapter import Adapter
from emf_lightning.networks.architecture_checks import (
    require,
    require_patches,
    require_position_width,
    require_positive,
)
from emf_lightning.networks.base import describe
from emf_lightning.networks.diffusers_flow_map import DiffusersFlowMap
from emf_lightning.networks.finetuning import Finetuning
from emf_lightning.networks.guidance_conditioning import no_guidance
from emf_lightning.networks.prediction import Prediction
from emf_lightning.networks.two_time.rules import AnchoredInterval, IntervalInput
from emf_lightning.networks.two_time.two_time_embedding import INTERVAL, NEGATIVE, TimePlaces, TwoTimeEmbedding
from emf_lightning.pretrained.loading import PretrainedWeights, unreadable


@dataclass(frozen=True)
class SanaArchitecture:
    """The size of a SANA transformer, in diffusers' own names; the defaults are those of the shapes experiments.

    Attributes:
        num_layers: transformer blocks.
        num_attention_heads: heads of the linear self-attention; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        num_cross_attention_heads: heads of the attention to the text; heads x channels must be the same width.
        cross_attention_head_dim: channels of one of them.
        mlp_ratio: expansion of the gated convolution block.
        patch_size: latent positions per token, along each side.
        interpolation_scale: None for SANA's published position-free form, 1 for sine-cosine positions.
        qk_norm: normalisation of queries and keys, e.g. ``rms_norm_across_heads`` (SANA-1.5), or None.
        dropout: of the attention outputs, in [0, 1).
    """

    num_layers: int = 6
    num_attention_heads: int = 6
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 3
    cross_attention_head_dim: int = 64
    mlp_ratio: float = 2.5
    patch_size: int = 12
    interpolation_scale: int | None = 1
    qk_norm: str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads")
        require_positive(self, *counts, "cross_attention_head_dim", "patch_size")
        require(self, 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        require(self, self.mlp_ratio > 0, f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.interpolation_scale is not None:
            require_positive(self, "interpolation_scale")
            require_position_width(self, self.num_attention_heads, self.attention_head_dim)
        width = self.num_attention_heads * self.attention_head_dim
        rule = "num_cross_attention_heads x cross_attention_head_dim must be num_attention_heads x attention_head_dim"
        heads, channels = self.num_cross_attention_heads, self.cross_attention_head_dim
        require(self, heads * channels == width, f"{rule} = {width}, got {heads} x {channels}")


class SanaFlowMap(DiffusersFlowMap):
    """A SANA transformer with a second time input, from scratch or from pretrained weights.

    Args:
        architecture: its size, if it starts from scratch.
        pretrained: the weights to start from instead: a local folder or hub name in diffusers' format, or a whole
            BLIP3o-NEXT or EMF checkpoint, whose SANA is taken; ``PretrainedWeights`` for a model inside a pipeline's
            repository.
        finetuning: changes before training, and the parameters that train.
        adapter: LoRA on the frozen network, which trains beside what the pretrained one lacked.
        prediction: rule from the network's output to u.
        time_scale: factor on t and r before SANA's sinusoidal embedding: 1000 as it was pretrained, 1 in EMF.
        interval: rule that joins r and t; by default a second time embedding, anchored so that the parent is
            preserved.
        guidance_conditioning: take guidance's scale and interval as conditions and predict v beside u, for
            ``ImprovedMeanFlow``. A pass without conditions has those of no guidance.
        negative_times: know a second flow at negative times, by a time embedding of its own that starts as a copy, for
            ``TwinFlow``. Not together with ``guidance_conditioning``.
        attention_backend: ``math`` attends to the text by plain matrix products rather than a fused kernel: for a
            dozen tokens on a CPU the fused kernel's backward pass alone takes a third of a step.
        gradient_checkpointing: keep no activations inside the blocks and compute them again in the backward pass: a
            third more operations for a fraction of the memory. The derivative keeps none in any case.
        compile: let torch compile the blocks, which takes a minute or more at the start.
        latent_channels: C of the latents.
        latent_size: H = W of the latents.
        context_width: D of the text features.

    Raises:
        ValueError: if pretrained weights cannot be loaded or disagree with the data.

    Example:
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> net = SanaFlowMap(
        ...     SanaArchitecture(2, 2, 8, 2, 8, patch_size=2), latent_channels=4, latent_size=8, context_width=16
        ... )
        >>> z, t, context, mask = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 16), torch.ones(1, 5).bool()
        >>> net(z, 0.5 * t, t, context, mask).shape
        torch.Size([1, 4, 8, 8])
    """

    context_width_key = "caption_channels"
    places = TimePlaces("time_embed", conditioning="time_embed", argument="timestep")

    def __init__(
        self,
        architecture: SanaArchitecture | None = None,
        *,
        pretrained: str | PretrainedWeights | None = None,
        finetuning: Finetuning | None = None,
        adapter: Adapter | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        interval: IntervalInput | None = None,
        guidance_conditioning: bool = False,
        negative_times: bool = False,
        attention_backend: Literal["math"] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        latent_channels: int = 3,
        latent_size: int = 36,
        context_width: int = 128,
    ) -> None:
        from emf_lightning.networks.sana_transformer import (
            GuidedSanaTransformer,
            IntervalSanaTransformer,
            TwinSanaTransformer,
        )

        super().__init__(architecture, pretrained, prediction, time_scale)
        self.latent_channels, self.latent_size, self.context_width = latent_channels, latent_size, context_width
        known = attention_backend in (None, "math")
        require(self, known, f"attention_backend must be math or null, got {attention_backend!r}")
        self.attention_backend = attention_backend
        self.interval = interval or AnchoredInterval()
        one = not (guidance_conditioning and negative_times)
        require(self, one, "set guidance_conditioning or negative_times, not both")
        self.takes_guidance, self.takes_negative_times = guidance_conditioning, negative_times
        finetuning = finetuning or Finetuning()
        plain = TwinSanaTransformer if negative_times else IntervalSanaTransformer
        kind = GuidedSanaTransformer if guidance_conditioning else plain
        weights = self._parent_of(pretrained, adapter, finetuning)
        if weights is None:
            size = architecture or SanaArchitecture()
            remedy = "change the data's resolution or architecture.patch_size"
            require_patches(self, latent_size, size.patch_size, remedy)
            self.transformer = kind(
                in_channels=latent_channels,
                out_channels=latent_channels,
                sample_size=latent_size,
                caption_channels=context_width,
                cross_attention_dim=size.num_cross_attention_heads * size.cross_attention_head_dim,
                **asdict(size),
            )
            self._record()
        else:
            self._load(kind, weights, finetuning)
            require_patches(self, latent_size, self.transformer.config.patch_size)
        if not self.interval.embeds_length:
            delattr(self.transformer.time_embed, INTERVAL)
        self.two_times = TwoTimeEmbedding(self.transformer, self.places, self.interval, self.blocks, time_scale)
        if guidance_conditioning:
            self.transformer.add_guidance()
        finetuning.freeze("SanaFlowMap", self.transformer)
        self._adapt()
        if gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if compile:
            self.compile_blocks()

    @property
    def diffusers_model(self) -> Any:
        return self.transformer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.transformer_blocks)

    @property
    def parametrization(self) -> dict[str, str | float]:
        """The prediction, the time scale, and the rule that joins r and t."""
        return super().parametrization | {"interval": describe(self.interval)}

    @property
    def new_parts(self) -> Sequence[str]:
        names = [prefix.rstrip(".") for prefix in self.transformer.initializers()]
        return [name for name in names if any(name == path for path, _ in self.transformer.named_modules())]

    def _load(self, kind: Any, weights: PretrainedWeights, finetuning: Finetuning) -> None:
        """Loads ``weights``, refits their time embedding on request and compares their settings with ours."""
        width = self.context_width if finetuning.reset_text_projection else None
        try:
            self.transformer = kind.from_flow(weights, width)
        except OSError as error:
            raise unreadable("SanaFlowMap", weights, error) from error
        self._as_saved()
        recorded = self._recorded()
        known = finetuning.reset_time is not None and recorded["interval"]
        require(self, not known, f"{weights} knows intervals, which reset_time would make it forget; leave it out")
        if finetuning.refit:
            self._refit_to_ours(weights, recorded)
        if finetuning.reset_time is not None:
            finetuning.draw_time(self.transformer.time_embed)
            self.transformer.copy_to(NEGATIVE)
            recorded["time_scale"] = None
        self._check_agreement(weights, recorded)
        if finetuning.reset_time is not None or finetuning.reset_text_projection:
            self.is_parent = False

    def _refit(self, old_scale: float) -> float:
        error = super()._refit(old_scale)
        self.transformer.init_copies()
        return error

    def refit_time(self, time_scale: float) -> float:
        """Fits the time embedding anew for inputs ``time_scale`` t (``two_time.refit``); returns its error.

        The interval's embedding becomes a copy of t's again, so this is for a network that knows no intervals yet; a
        network that starts from it may have any rule for them.
        """
        old_scale, self.time_scale = self.time_scale, time_scale
        error = self._refit(old_scale)
        self._record()
        self.transformer.register_to_config(_flow_interval=None)
        return error

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        if self.attention_backend == "math":  # the blocks' second pass is outside ``backbone``
            self.transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=_math))

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """SANA's output; t - r is taken in fp32 inside the time embedding, after scaling."""
        assert self.takes_guidance or conditions is None, "this network takes no conditions: set guidance_conditioning"
        dtype = self.transformer.dtype
        if self.takes_guidance:
            self.transformer.guidance = no_guidance(t) if conditions is None else conditions
        attention = sdpa_kernel(SDPBackend.MATH) if self.attention_backend == "math" else nullcontext()
        with attention, self.two_times.at(self.timestep(r), self.timestep(t)):
            return self.transformer(
                z.to(dtype),
                context.to(dtype),
                timestep=self.timestep(t),
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]


def _math() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a block's first pass, which ``backbone`` has set, and of its second."""
    return nullcontext(), sdpa_kernel(SDPBackend.MATH)
