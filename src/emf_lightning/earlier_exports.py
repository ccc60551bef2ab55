"""Exported folders of earlier versions, read in today's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Spec = dict[str, Any]

_MODULES = {"emf_lightning.networks.interval": "emf_lightning.networks.two_time.rules"}
"""Modules whose classes moved."""

_ARGUMENTS: dict[tuple[str, str], Callable[[Any], Spec]] = {
    ("Pixels", "offset"): lambda value: {"shift": value},
    ("WordEncoder", "reach"): lambda value: {"window": value},
    ("SanaFlowMap", "improved"): lambda value: {"guidance_conditioning": value},
    ("SanaFlowMap", "math_attention"): lambda value: {"attention_backend": "math" if value else None},
    ("SanaFlowMap", "fresh_context"): lambda value: {},
    ("SanaFlowMap", "refit"): lambda value: {},
    ("SanaFlowMap", "trainable"): lambda value: {},
    **{
        (kind, "subfolder"): lambda value: {}  # an export has each part in a folder of its own
        for kind in ("SanaFlowMap", "UNetFlowMap", "TextUNetFlowMap", "MMDiTFlowMap")
    },
}
"""(Class, argument that is no more) -> the arguments in its place."""

_FLOW_MAP: Spec = {"class_path": "emf_lightning.flow.sampling.FlowMapSampler"}
_EULER: Spec = {"class_path": "emf_lightning.flow.sampling.EulerSampler"}
_CLASSIFIER_FREE: Spec = {"class_path": "emf_lightning.flow.guidance.ClassifierFreeGuidance"}


def migrate_part(spec: Any) -> Any:
    """A part's spec with today's classes and arguments; anything else unchanged."""
    if isinstance(spec, list):
        return [migrate_part(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    if "class_path" not in spec:
        return {key: migrate_part(value) for key, value in spec.items()}
    if not isinstance(spec.get("init_args") or {}, dict):
        return spec
    module, _, name = str(spec["class_path"]).rpartition(".")
    arguments: Spec = {}
    for argument, value in (spec.get("init_args") or {}).items():
        renamed = _ARGUMENTS.get((name, argument))
        arguments |= {argument: migrate_part(value)} if renamed is None else renamed(value)
    return {"class_path": f"{_MODULES.get(module, module)}.{name}", "init_args": arguments}


def sampling_of_model(model: Spec) -> tuple[Spec, Spec, float]:
    """Specs of the sampler and of the guidance, and the guidance scale, of a LightningModule of an earlier version."""
    name, arguments = model["class_path"].rpartition(".")[2], model.get("init_args")
    if not isinstance(arguments, dict):
        arguments = {}
    sampler: Spec = _EULER
    guidance: Spec = _CLASSIFIER_FREE
    scale = 1.0
    if name in ("MeanFlow", "ImprovedMeanFlow"):
        sampler = _FLOW_MAP
    elif name == "FGM":
        start = arguments.get("generator_time", 1.0)
        sampler = {"class_path": "emf_lightning.flow.sampling.MultistepSampler", "init_args": {"start": start}}
    if name == "ImprovedMeanFlow":
        scale, interval = 2.0, arguments.get("guidance_interval", (0.0, 1.0))
        guidance = {
            "class_path": "emf_lightning.flow.guidance.ConditionedGuidance",
            "init_args": {"interval": interval},
        }
    return sampler, guidance, arguments.get("guidance", scale)
