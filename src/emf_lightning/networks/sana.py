"""SANA (diffusers' ``SanaTransformer2DModel``) as a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emf_lightning.flow.objectives.improved_meanflow import Guidance
from emf_lightning.networks.base import FlowMapNetwork, written
from emf_lightning.networks.prediction import Prediction, PredictVelocity
from emf_lightning.networks.two_time.rules import AnchoredInterval, IntervalInput

PRETRAINED_TIME_SCALE = 1000.0
"""The factor on t that SANA's published weights were trained with."""


@dataclass(frozen=True)
class SanaArchitecture:
    """The size of a SANA transformer, in diffusers' own names; the defaults are the small shapes world's.

    Attributes:
        num_layers: transformer blocks.
        num_attention_heads: heads of the linear self-attention; the width is heads x ``attention_head_dim``.
        attention_head_dim: channels of one of them.
        num_cross_attention_heads: heads of the attention to the text.
        cross_attention_head_dim: channels of one of them.
        mlp_ratio: expansion of the gated convolution block.
        patch_size: latent positions per token, along each side.
        interpolation_scale: None for SANA's published position-free form, 1 for sine-cosine positions.
        qk_norm: normalisation of queries and keys, e.g. ``rms_norm_across_heads`` (SANA-1.5), or None.
        dropout: of the attention outputs.
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


class SanaFlowMap(FlowMapNetwork):
    """A SANA transformer with a second time input, from scratch or from pretrained weights.

    Args:
        architecture: its size, where it starts from scratch.
        pretrained: folder or hub name to start from instead: in diffusers' format, or a whole BLIP3o-NEXT or EMF
            checkpoint, whose SANA is taken.
        subfolder: e.g. ``transformer`` for a whole pipeline's repository.
        prediction: what the network's output stands for.
        time_scale: factor on t and r before SANA's sinusoidal embedding: 1000 as it was pretrained, 1 as EMF feeds it.
        refit: fit the pretrained time embedding anew where it knows another ``time_scale`` (1000, if the weights do
            not say), in some seconds at the start. Without it EMF's network has to learn t from scratch.
        trainable: parameters that train, by the beginnings of their names; null for all of them. EMF's are
            ``[transformer_blocks, time_embed, scale_shift_table]``.
        fresh_context: start the text projection anew, for text features of another width than the weights know.
        math_attention: attend to the text by plain matrix products rather than a fused kernel: for a dozen tokens on a
            CPU the fused kernel's backward pass alone takes a third of a step.
        interval: how r joins t; by default a second time embedding, anchored so that the parent is preserved.
        improved: take guidance's scale and interval as conditions and give a velocity beside u, ``[B, 2 C, H, W]``: for
            ``ImprovedMeanFlow``. Where no conditions are given they are those of no guidance.
        gradient_checkpointing: keep no activations inside the blocks and compute them again in the backward pass: a
            third more operations for a fraction of the memory. The derivative keeps none anyhow.
        compile: let torch compile the blocks, which takes a minute or more at the start.
        latent_channels: C of the latents.
        latent_size: H = W of the latents.
        context_width: D of the text features.

    Raises:
        ValueError: where pretrained weights are not to be had or disagree with the data.
    """

    def __init__(
        self,
        architecture: SanaArchitecture | None = None,
        pretrained: str | None = None,
        subfolder: str | None = None,
        prediction: Prediction | None = None,
        time_scale: float = 1000.0,
        refit: bool = False,
        trainable: list[str] | None = None,
        fresh_context: bool = False,
        interval: IntervalInput | None = None,
        improved: bool = False,
        math_attention: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        latent_channels: int = 3,
        latent_size: int = 36,
        context_width: int = 128,
    ) -> None:
        from emf_lightning.networks.sana_transformer import ImprovedSanaTransformer, IntervalSanaTransformer

        super().__init__()
        self.prediction = prediction or PredictVelocity()
        self.time_scale = time_scale
        self.latent_channels, self.latent_size, self.context_width = latent_channels, latent_size, context_width
        self.math_attention = math_attention
        self.interval = interval or AnchoredInterval()
        self.improved = improved
        kind = ImprovedSanaTransformer if improved else IntervalSanaTransformer
        if pretrained is None:
            size = architecture or SanaArchitecture()
            _check_patches(latent_size, size.patch_size, "change the data's resolution or architecture.patch_size")
            self.transformer = kind(
                in_channels=latent_channels,
                out_channels=latent_channels,
                sample_size=latent_size,
                caption_channels=context_width,
                cross_attention_dim=size.num_cross_attention_heads * size.cross_attention_head_dim,
                **asdict(size),
            )
            self._sign()
        else:
            if architecture is not None:
                raise ValueError("SanaFlowMap: give `architecture` or `pretrained`, not both; the weights say the size")
            try:
                self.transformer = kind.from_flow(pretrained, subfolder, context_width if fresh_context else None)
            except OSError as error:
                raise ValueError(
                    f"SanaFlowMap: no readable weights at pretrained={pretrained!r}: give a folder in diffusers' "
                    "format, or a hub name that is in the local cache or can be reached"
                ) from error
            self._check(pretrained, latent_channels, context_width, refit)
            _check_patches(latent_size, self.transformer.config.patch_size, "change the data's resolution")
        self.transformer.take(self.interval)
        if trainable is not None:
            self._train_only(trainable)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.recomputed = True
        if compile:
            self.compile_blocks()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks."""
        return list(self.transformer.transformer_blocks)

    @property
    def meaning(self) -> dict[str, str | float]:
        """The prediction, how r joins t, and the time scale."""
        return super().meaning | {"interval": written(self.interval), "time_scale": self.time_scale}

    def _sign(self) -> None:
        """Puts the meaning into what ``save_pretrained`` writes."""
        self.transformer.register_to_config(**{f"_flow_{name}": value for name, value in self.meaning.items()})

    def _check(self, pretrained: str, latent_channels: int, context_width: int, refit: bool) -> None:
        """Compares what the weights mean with what the settings say, and refits their time embedding if asked to."""
        config = self.transformer.config
        theirs = {name: config.get(f"_flow_{name}") for name in self.meaning}
        scale = theirs["time_scale"] or PRETRAINED_TIME_SCALE
        if refit and scale != self.time_scale:
            if theirs["interval"]:
                raise ValueError(
                    f"SanaFlowMap: {pretrained} knows intervals at time_scale {scale:g}, which refit would make it "
                    "forget; leave refit out and set that time_scale"
                )
            self._refit(scale)
            theirs["time_scale"] = None
        for name, ours, there in (
            ("latent channels", latent_channels, config.in_channels),
            ("text feature width", context_width, config.caption_channels),
            *((name, value, theirs[name] or value) for name, value in self.meaning.items()),
        ):
            if ours != there:
                raise ValueError(
                    f"SanaFlowMap: {pretrained} was trained with {name} {there!r}, this experiment has {ours!r}; "
                    "make the data, encoder or net settings agree, or start from other weights"
                )
        self._sign()

    def _refit(self, old_scale: float) -> float:
        if self.transformer.device.type == "meta":
            return 0.0
        error = self.transformer.time_embed.refit(old_scale, self.time_scale)
        self.transformer.time_embed.duplicate()
        return error

    def _train_only(self, beginnings: list[str]) -> None:
        names = [name for name, _ in self.transformer.named_parameters()]
        for beginning in beginnings:
            if not any(_begins(name, beginning) for name in names):
                raise ValueError(
                    f"SanaFlowMap: trainable={beginning!r} is the beginning of no parameter's name; there are "
                    f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
                )
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(any(_begins(name, beginning) for beginning in beginnings))

    def refit_time(self, time_scale: float) -> float:
        """The relative error of reading ``time_scale`` t as the present scale was read (``IntervalEmbedding.refit``).

        The interval's embedding becomes a copy of t's again, so this is for a network that knows no intervals yet: what
        starts from it may choose how it takes them.
        """
        old_scale, self.time_scale = self.time_scale, time_scale
        error = self._refit(old_scale)
        self._sign()
        self.transformer.register_to_config(_flow_interval=None)
        return error

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes ``config.json`` and safetensors in diffusers' format; ``pretrained=directory`` reads them back."""
        self.transformer.save_pretrained(str(directory))

    def backbone(
        self, z: Tensor, r: Tensor, t: Tensor, context: Tensor, mask: Tensor, conditions: Tensor | None = None
    ) -> Tensor:
        """SANA's output; t - r is taken in fp32 inside the time embedding, after scaling."""
        assert t.dtype in (torch.float32, torch.float64)
        assert self.improved or conditions is None, "this network takes no conditions: set net.improved"
        dtype, guidance = self.transformer.dtype, r * self.time_scale
        if self.improved:
            conditions = Guidance.none(t).conditions if conditions is None else conditions
            guidance = torch.cat([guidance[:, None], conditions], dim=1)
        kernel = sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext()
        with kernel:
            output: Tensor = self.transformer(
                z.to(dtype),
                context.to(dtype),
                timestep=t * self.time_scale,
                guidance=guidance,
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
        return output


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}.")


def _check_patches(latent_size: int, patch_size: int, remedy: str) -> None:
    if latent_size % patch_size:
        raise ValueError(
            f"SanaFlowMap: latents of side {latent_size} do not divide into patches of {patch_size}; {remedy}"
        )
