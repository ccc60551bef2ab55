"""The classes that YAML may name where a stranger may have written it: every verb but `emf fit`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

import emf_lightning
from emf_lightning.part_classes import FLAG, trusted

PACKAGES = ("callbacks", "data", "evaluation", "flow", "latents", "modules", "networks", "text")
"""Packages of ``emf_lightning`` all of whose classes YAML may name."""

_LIBRARIES = {
    "lightning.pytorch.callbacks": ("Callback",),
    "lightning.pytorch.loggers": ("Logger",),
    "lightning.pytorch.profilers": ("Profiler",),
    "lightning.pytorch.strategies": ("Strategy",),
    "lightning.pytorch.accelerators": ("Accelerator",),
    "lightning.pytorch.plugins": ("Precision", "CheckpointIO", "ClusterEnvironment", "LayerSync"),
    "lightning.pytorch.plugins.environments": ("ClusterEnvironment",),
    "lightning.pytorch.plugins.io": ("CheckpointIO",),
    "lightning.pytorch.plugins.precision": ("Precision",),
    "torch.optim": ("Optimizer",),
    "torch.optim.lr_scheduler": ("LRScheduler",),
    "timm.optim": ("torch.optim.Optimizer",),
}
"""Modules of other libraries, and the bases of those of their classes that YAML may name."""

_SETTINGS = ("import_path_verdicts", "import_paths_enforced", "instantiate_subclass_spec_in_any")


@contextmanager
def known_classes_only(imported: bool = False) -> Iterator[None]:
    """A context in which the parser imports no class but those of this package and of ``_LIBRARIES``.

    It decides by the name, before it imports anything, and again by the place where the object is defined. Functions
    are none of these; a place without a type builds nothing; ``${...}`` names other values, and no resolver, which may
    read the environment or run code. Inside ``trusting(True)`` nothing changes. With
    ``imported``, the known classes are those that are imported already: a verb without an experiment starts sooner.
    """
    if trusted():
        yield
        return
    from jsonargparse import _common, set_parsing_settings
    from omegaconf.basecontainer import BaseContainer

    # these settings are global, and the libraries have no public way back
    resolvers, BaseContainer._resolvers = BaseContainer._resolvers, {}
    before = {name: _common.parsing_settings[name] for name in _SETTINGS}
    try:
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=sorted(_known(imported)),
            instantiate_subclass_spec_in_any=False,
        )
        yield
    finally:
        _common.parsing_settings.update(before)
        BaseContainer._resolvers = resolvers


def refusal(text: str) -> str | None:
    """The message for a class that the parser refused to import, if its error ``text`` is about one."""
    _, found, rest = text.partition("Importing '")
    path, _, reason = rest.partition("' is not allowed")
    if not found or not reason:
        return None
    return (
        f"{path} is no class of emf_lightning, nor a part of lightning.pytorch, torch.optim or timm.optim: building it "
        f"may run any code; if you trust who wrote the files, add --{FLAG}"
    )


def _known(imported: bool) -> set[str]:
    """Paths of the known classes: where they are defined, and where their packages show them."""
    if not imported:
        for package in PACKAGES:
            for found in walk_packages(import_module(f"emf_lightning.{package}").__path__, f"emf_lightning.{package}."):
                import_module(found.name)
    ours = [
        module
        for name, module in sys.modules.items()
        if name.startswith("emf_lightning.") and name.split(".")[1] in PACKAGES and isinstance(module, ModuleType)
    ]
    known = {path for module in ours for path in _classes(module, "emf_lightning", object)}
    known |= {f"emf_lightning.{name}" for name in emf_lightning.__all__}
    for name, bases in _LIBRARIES.items():
        if imported and name not in sys.modules:
            continue
        module = import_module(name)
        for base in bases:
            owner, _, base_name = base.rpartition(".")
            kind = getattr(import_module(owner or name), base_name)
            known |= _classes(module, name.partition(".")[0], kind)
    return known


def _classes(module: ModuleType, package: str, base: type) -> set[str]:
    found = set()
    for name, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, base) and value.__module__.partition(".")[0] == package:
            found |= {f"{module.__name__}.{name}", f"{value.__module__}.{value.__qualname__}"}
    return found
