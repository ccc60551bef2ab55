"""Flow matching that trains the text encoder, too: what the EMF paper's encoder-SFT rows start from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn, optim

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.flow.times import TimeSampler
from emf_lightning.flow.weighting import Weighting
from emf_lightning.modules.flow_matching import FlowMatching
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.pretrained import PretrainedTextEncoder


class EncoderTuning(FlowMatching):
    """Trains network and text encoder together by flow matching (arXiv 2604.18168, table 5: "encoder SFT").

    The encoder is the datamodule's, a ``PretrainedTextEncoder`` in float32 without a cache; it stays in eval mode, so
    without dropout. ``SaveEncoder`` writes it as a folder that later experiments name in place of the hub's.

    Args:
        net: see ``FlowMatching``, as ``times``, ``weighting``, ``scheduler``, ``caption_dropout``, ``guidance``,
            ``initial``, ``gather_once``.
        optimizer: called with the trainable parameters of both, in two groups.
        encoder_rate: the encoder's learning rate over the network's.
    """

    def __init__(
        self,
        net: FlowMapNetwork,
        times: TimeSampler | None = None,
        weighting: Weighting | None = None,
        optimizer: OptimizerCallable = optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        guidance: float = 1.0,
        initial: str | None = None,
        gather_once: bool = False,
        encoder_rate: float = 1.0,
    ) -> None:
        super().__init__(net, times, weighting, optimizer, scheduler, caption_dropout, guidance, initial, gather_once)
        if encoder_rate <= 0:
            raise ValueError(f"EncoderTuning: encoder_rate must be positive, got {encoder_rate}")
        self.encoder_rate = encoder_rate
        self.encoder: nn.Module | None = None
        self.save_hyperparameters(logger=False)

    def configure_model(self) -> None:
        """Takes the datamodule's encoder, in which captions are encoded for validation and sampling, too."""
        super().configure_model()
        if self.encoder is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, CaptionImageData) or not isinstance(data.text, PretrainedTextEncoder):
            raise ValueError("EncoderTuning trains a PretrainedTextEncoder: set data.text to one, e.g. SanaGemma")
        if data.cache is not None:
            raise ValueError("EncoderTuning: data.cache would keep what the encoder said before; leave it out")
        if data.text.dtype != "float32":
            raise ValueError(
                f"EncoderTuning: data.text.init_args.dtype is {data.text.dtype}, whose weights lose small updates; set "
                "float32"
            )
        data.text.tower.requires_grad_(True)
        self.encoder = data.text

    def configure_optimizers(self) -> Any:
        assert self.encoder is not None
        network, encoder = ([p for p in m.parameters() if p.requires_grad] for m in (self.net, self.encoder))
        optimizer = self.optimizer([{"params": network}, {"params": encoder}])  # type: ignore[arg-type]
        optimizer.param_groups[1]["lr"] *= self.encoder_rate
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.trainer.datamodule.forget_null()  # type: ignore[attr-defined]

    def drop_captions(self, batch: CaptionImageBatch) -> tuple[TextFeatures, Tensor]:
        """The captions' features as the encoder gives them now, with a graph; the null caption's likewise."""
        assert isinstance(self.encoder, PretrainedTextEncoder)
        both = self.encoder.encode([*batch.captions, NULL_CAPTION])
        rows = len(batch)
        return super().drop_captions(
            CaptionImageBatch(batch.latents, both[slice(rows)], both[slice(rows, None)], batch.captions)
        )
