"""What a forked process finds imported: all that a training and these tests' modules need; nothing has run."""

# ruff: noqa: F401
import gc

import diffusers.models.transformers.sana_transformer
import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard

from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.parsing.emf_cli import CLASS_PACKAGES

import_classes(*CLASS_PACKAGES)
gc.freeze()  # no collection in a fork copies the pages of all that is here
