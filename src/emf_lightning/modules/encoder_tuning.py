"""Training of the network together with the text encoder: the start of the EMF paper's encoder-SFT rows."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.flow.objectives.base import Objective
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization, lightning_optimizers
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.pretrained import PretrainedTextEncoder


class EncoderTuning(FlowMapModule):
    """Trains network and text encoder together (arXiv 2604.18168, table 5: "encoder SFT").

    The encoder is the datamodule's, a ``PretrainedTextEncoder`` in float32 without a cache; it stays in eval mode, so
    without dropout. ``SaveEncoder`` writes it as a folder that later experiments name in place of the hub's.

    Args:
        net: see ``FlowMapModule``.
        objective: by default ``FlowMatching``.
        optimization: of the trainable parameters of both, in two groups.
        encoder_rate: the encoder's learning rate over the network's.
        caption_dropout: see ``FlowMapModule``.
        guidance_scale: see ``FlowMapModule``.
        init_from: see ``FlowMapModule``.
        gather_once: see ``FlowMapModule``.

    Example:
        >>> from emf_lightning.networks.sana import SanaArchitecture
        >>> size = SanaArchitecture(1, 2, 8, 2, 8, patch_size=12)
        >>> net = SanaFlowMap(size)
        >>> EncoderTuning(net, encoder_rate=0.1).tunes_encoder
        True
    """

    tunes_encoder = True

    def __init__(
        self,
        net: FlowMapNetwork,
        objective: Objective | None = None,
        *,
        optimization: Optimization = Optimization(),
        encoder_rate: float = 1.0,
        caption_dropout: float = 0.1,
        guidance_scale: float = 1.0,
        init_from: str | None = None,
        gather_once: bool = False,
    ) -> None:
        super().__init__(
            net,
            objective or FlowMatching(),
            optimization=optimization,
            caption_dropout=caption_dropout,
            guidance_scale=guidance_scale,
            init_from=init_from,
            gather_once=gather_once,
        )
        if encoder_rate <= 0:
            raise ValueError(f"EncoderTuning: encoder_rate must be positive, got {encoder_rate}")
        self.encoder_rate = encoder_rate
        self.encoder: nn.Module | None = None

    def configure_model(self) -> None:
        """Takes the datamodule's encoder, which also encodes captions for validation and sampling."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("EncoderTuning: ModelParallelStrategy shards one network, and here are two: set ddp")
        super().configure_model()
        if self.encoder is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CaptionImageData) or not isinstance(data.text, PretrainedTextEncoder):
            raise ValueError("EncoderTuning trains a PretrainedTextEncoder: set data.text to one, e.g. SanaGemma")
        if data.cache is not None:
            raise ValueError("EncoderTuning: data.cache would keep features of the untrained encoder; leave it out")
        if data.text.dtype != "float32":
            raise ValueError(
                f"EncoderTuning: data.text.init_args.dtype is {data.text.dtype}, whose weights lose small updates; set "
                "float32"
            )
        data.text.tower.requires_grad_(True)
        self.encoder = data.text

    def configure_optimizers(self) -> Any:
        assert self.encoder is not None
        groups = [{"params": [p for p in m.parameters() if p.requires_grad]} for m in (self.net, self.encoder)]
        optimizer = self.optimization.optimizer(groups)
        optimizer.param_groups[1]["lr"] *= self.encoder_rate
        scheduler = self.optimization.scheduler
        return lightning_optimizers(optimizer, None if scheduler is None else scheduler(optimizer))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.trainer.datamodule.forget_null()  # type: ignore[attr-defined]

    def drop_captions(self, batch: CaptionImageBatch) -> tuple[TextFeatures, Tensor]:
        """Features of the captions as the encoder is now, with a graph; those of the null caption likewise."""
        assert isinstance(self.encoder, PretrainedTextEncoder)
        both = self.encoder.encode([*batch.captions, NULL_CAPTION])
        size = len(batch)
        return super().drop_captions(
            CaptionImageBatch(batch.latents, both[slice(size)], both[slice(size, None)], batch.captions)
        )
