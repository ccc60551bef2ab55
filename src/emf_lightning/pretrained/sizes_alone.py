"""Models in their size alone: built from their configurations on the meta device, without weights and without a hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from emf_lightning.pretrained.files import config_of
from emf_lightning.pretrained.loading import planning


@contextmanager
def sizes_alone(own: bool = True) -> Iterator[None]:
    """A context in which the hub is not asked, and models have their sizes and no weights.

    With ``own``, that holds for every ``from_pretrained`` of transformers and diffusers: own classes call them.
    """
    from huggingface_hub import constants

    with ExitStack() as stack:
        stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(planning())
        if own:
            from diffusers import ModelMixin
            from transformers import PreTrainedModel

            stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(_of_transformers)))
            stack.enter_context(patch.object(ModelMixin, "from_pretrained", classmethod(_of_diffusers)))
        yield


def _of_transformers(kind: Any, /, name: Any = None, *_: Any, config: Any = None, **options: Any) -> Any:
    if config is None:
        config = kind.config_class(**config_of(str(name), options.get("subfolder")))
    with torch.device("meta"):
        return _cast(kind(config), options)


def _of_diffusers(kind: Any, /, name: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return _cast(kind.from_config(config_of(str(name), options.get("subfolder"))), options)


def _cast(model: Any, options: dict[str, Any]) -> Any:
    dtype = options.get("dtype") or options.get("torch_dtype")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return model if dtype is None else torch.nn.Module.to(model, dtype=dtype)
