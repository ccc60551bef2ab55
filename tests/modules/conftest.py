from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.text.words import WordEncoder

CAPTIONS = ("a red circle", "a blue square", "a green cross", "two circles")
TINY = SanaArchitecture(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    patch_size=4,
)


class Batches(Dataset):
    """``count`` fixed batches of random images with real captions."""

    def __init__(self, count: int, rows: int = 8) -> None:
        self.count, self.rows = count, rows
        self.encoder = WordEncoder(width=16, length=4)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> CaptionImageBatch:
        captions = tuple(CAPTIONS[(index + row) % len(CAPTIONS)] for row in range(self.rows))
        latents = torch.randn(self.rows, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        return CaptionImageBatch(latents, self.encoder(captions), self.encoder([""]), captions)


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(Batches(6), batch_size=None)


@pytest.fixture
def net() -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16)
