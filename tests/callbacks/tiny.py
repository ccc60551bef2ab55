"""A real experiment that trains in a second: two objects' worth of everything."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emf_lightning.data.datamodule import CaptionImageData
from emf_lightning.data.shapes.shards import write_shards
from emf_lightning.data.shapes.world import SMALL
from emf_lightning.flow.objectives.flow_matching import FlowMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.latents.pixels import Pixels
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.text.words import WordEncoder

SIZE = SanaArchitecture(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=4,
    num_cross_attention_heads=2,
    cross_attention_head_dim=4,
    patch_size=12,
)


def shards(folder: Path) -> Path:
    """A folder with 64 training images."""
    write_shards(SMALL, folder, 64, samples_per_shard=32)
    return folder


def data(folder: Path, **arguments) -> CaptionImageData:
    """The datamodule of ``shards(folder)``, without a worker process."""
    return CaptionImageData(
        WordEncoder(width=16), Pixels(), str(folder), batch_size=8, num_workers=0, shuffle_block=16, **arguments
    )


def network() -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(SIZE, context_width=16)


def meanflow(**settings) -> FlowMapModule:
    return FlowMapModule(network(), MeanFlow(**settings))


def flow_matching() -> FlowMapModule:
    return FlowMapModule(network(), FlowMatching())


def trainer(run: Path, *callbacks: Callback, **arguments) -> Trainer:
    """A trainer of four steps on one CPU core that logs into ``run`` itself."""
    settings = {
        "max_steps": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(run.parent, name="", version=run.name),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**settings, **arguments})


def events(run: Path) -> EventAccumulator:
    """What TensorBoard finds in ``run``."""
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
