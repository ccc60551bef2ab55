"""Strict loading of published weights with the classes of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emf_lightning.digests import check_digests
from emf_lightning.pretrained.files import config_of

_PLANNING = ContextVar("planning", default=False)


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights to start from.

    Attributes:
        path: local folder, or name on the Hugging Face hub.
        subfolder: folder of one model in the repository of a whole pipeline, e.g. ``transformer``.
    """

    path: str
    subfolder: str | None = None

    def __post_init__(self) -> None:
        if self.path.startswith("~"):
            object.__setattr__(self, "path", str(Path(self.path).expanduser()))

    @classmethod
    def of(cls, source: str | PretrainedWeights) -> PretrainedWeights:
        """``source``, which may be its path alone."""
        return source if isinstance(source, cls) else cls(str(source))

    def __str__(self) -> str:
        return self.path if self.subfolder is None else f"{self.path} (subfolder {self.subfolder})"


@dataclass(frozen=True)
class LoadedModel:
    """A model and the differences between its parameters and the weights that were read.

    The weights lack the ``missing`` names, whose parameters are newly initialised, and have the ``mismatched`` ones in
    other shapes; the model lacks the ``surplus`` ones.
    """

    model: Any
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)


def on_meta_device() -> bool:
    """True inside ``with torch.device("meta")`` and ``with planning()``, where models are built without weights."""
    return _PLANNING.get() or torch.get_default_device().type == "meta"


@contextmanager
def planning() -> Iterator[None]:
    """A context in which published models are built on the meta device, whatever the device of all else."""
    before = _PLANNING.set(True)
    try:
        yield
    finally:
        _PLANNING.reset(before)


def load_pretrained(
    caller: str,
    kind: Any,
    source: str | PretrainedWeights,
    *,
    frozen: bool,
    dtype: str | None = None,
    argument: str = "pretrained",
    remedy: str | None = None,
    part: Callable[[Any], Any] = lambda model: model,
    unused: tuple[str, ...] = (),
    surplus: tuple[str, ...] = (),
    **arguments: Any,
) -> Any:
    """A model of class ``kind`` all of whose parameters were read; on the meta device its size alone.

    Both libraries initialise parameters that a checkpoint lacks, and go on. transformers' checkpoints may hold more
    than the model has (a language model's head), diffusers' may not.

    Args:
        caller: the class that messages begin with.
        kind: a model class of diffusers or transformers.
        source: the weights; a name for messages alone if ``arguments`` bring a ``state_dict``.
        frozen: return it in eval mode without gradients; otherwise in train mode.
        dtype: of the weights; by default the library's.
        argument: the caller's argument that holds ``source``, for messages.
        remedy: advice at the end of messages.
        part: selects the submodule that is returned and checked.
        unused: parts of the names of weights that a checkpoint may lack, as they do not affect the output.
        surplus: beginnings of the names of weights that a checkpoint may have beside the model's.
        **arguments: of ``from_pretrained``.

    Raises:
        ValueError: if the model cannot be loaded, or the weights lack a parameter or have it in another shape.
    """
    weights = PretrainedWeights.of(source)
    try:
        loaded = read_model(kind, weights, getattr(torch, dtype) if dtype else None, **arguments)
    except Exception as error:  # its type depends on what is wrong in the files
        raise unreadable(caller, weights, error, argument, remedy) from error
    model = part(loaded.model)
    prefix = next(f"{name}." * bool(name) for name, module in loaded.model.named_modules() if module is model)
    lost = [name for name in loaded.missing if not any(each in name for each in unused)] + loaded.mismatched
    lost = [name for name in lost if name.startswith(prefix)]
    others = [name for name in loaded.surplus if not name.startswith(surplus)] if _of_diffusers(kind) else []
    if lost or others:
        difference = f"lacks {len(lost)}" if lost else f"has {len(others)} too many"
        raise ValueError(
            f"{caller}: {_named(weights, argument)} {difference} of the weights of a {type(loaded.model).__name__}, "
            f"{min(lost or others)} among them{', or has them in other shapes' * bool(lost)}: it is incomplete, or "
            f"another model; {remedy or _remedy(weights)}"
        )
    return model.eval().requires_grad_(False) if frozen else model.train()


def read_model(
    kind: Any, weights: PretrainedWeights, dtype: torch.dtype | None = None, **arguments: Any
) -> LoadedModel:
    """A model of class ``kind`` with the weights that fit it, without a check; on the meta device its size alone.

    Unreadable or missing files raise the libraries' ``OSError``, ``ValueError`` or ``RuntimeError``.
    """
    diffusers = _of_diffusers(kind)
    if on_meta_device():
        config = config_of(weights.path, weights.subfolder) | arguments
        with torch.device("meta"):
            model = kind.from_config(config) if diffusers else kind(kind.config_class(**config))
        return LoadedModel(model if dtype is None else nn.Module.to(model, dtype=dtype))  # diffusers' own `to` warns
    check_digests(Path(weights.path))
    arguments |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    arguments |= {} if weights.subfolder is None else {"subfolder": weights.subfolder}
    arguments |= {} if dtype is None else {"torch_dtype" if diffusers else "dtype": dtype}
    arguments |= {"low_cpu_mem_usage": False} if diffusers else {}
    logging = import_module("diffusers.utils.logging" if diffusers else "transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list missing and surplus weights, which callers check
    try:
        model, report = kind.from_pretrained(None if "state_dict" in arguments else weights.path, **arguments)
    finally:
        logging.set_verbosity(verbosity)
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    return LoadedModel(model, list(report["missing_keys"]), mismatched, list(report["unexpected_keys"]))


def unreadable(
    caller: str,
    source: str | PretrainedWeights,
    error: Exception,
    argument: str = "pretrained",
    remedy: str | None = None,
) -> ValueError:
    """The message for weights, or for files beside them, that cannot be loaded."""
    weights = PretrainedWeights.of(source)
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ValueError(f"{caller}: cannot load {_named(weights, argument)} ({reason}); {remedy or _remedy(weights)}")


def _named(weights: PretrainedWeights, argument: str) -> str:
    return f"{weights.subfolder} of " * bool(weights.subfolder) + f"{argument}={weights.path!r}"


def _remedy(weights: PretrainedWeights) -> str:
    advice = f"download it first with `hf download {weights.path}`, or give the path of a local folder"
    return f"{advice}; check `subfolder`" if weights.subfolder else advice


def _of_diffusers(kind: Any) -> bool:
    return hasattr(kind, "load_config")
