"""The classes that an exported folder's code imports: who loads them said that the folder is trusted."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from emf_lightning.part_classes import trusting
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.pipeline_part import PipelinePart


class TrustedPart(PipelinePart):
    """A part whose spec may name any class."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *arguments: Any, **options: Any) -> PipelinePart:
        with trusting(True):
            return super().from_pretrained(folder, *arguments, **options)


class TrustedPipeline(EMFPipeline):
    """A pipeline whose sampler and guidance may be of any class."""

    @wraps(EMFPipeline.__init__)  # type: ignore[misc]  # diffusers reads the parts off this signature
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        with trusting(True):
            super().__init__(*arguments, **settings)
