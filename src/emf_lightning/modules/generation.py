"""The pipeline of a module: images of prompts, in memory and for export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emf_lightning.part_classes import Spec, spec_of, trusting
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.pipeline_part import PipelinePart

if TYPE_CHECKING:
    from emf_lightning.data.datamodule import CaptionImageData

AUTOCAST = {"bf16-mixed": "bfloat16", "bf16": "bfloat16", "16-mixed": "float16", "16": "float16"}
"""Lightning's names of the precisions that compute in 16 bits by autocast, and torch's dtype."""


def pipeline_of(
    module: Any, data: CaptionImageData, precision: str, specs: Mapping[str, Spec] | None = None
) -> EMFPipeline:
    """The pipeline that generates the same images as ``module`` in `emf predict`.

    Args:
        module: a ``FlowMapModule`` with its weights.
        data: the datamodule of the same experiment.
        precision: of the Trainer, e.g. ``bf16-mixed``.
        specs: of the parts ``net``, ``autoencoder`` and ``text``; without them the pipeline cannot be saved.
    """
    specs = specs or {}
    with trusting(True):  # the classes of objects that are there already
        return EMFPipeline(
            transformer=PipelinePart(module.net, specs.get("net", {})),
            vae=PipelinePart(data.autoencoder, specs.get("autoencoder", {})),
            text_encoder=PipelinePart(data.text, specs.get("text", {})),
            sampler=spec_of(module.objective.sampler),
            guidance=spec_of(module.objective.sampling_guidance),
            guidance_scale=module.guidance_scale,
            latent_size=data.latent_size,
            autocast=AUTOCAST.get(precision),
            features=data.cache.dtype if data.cache is not None else None,
        )


def attached_pipeline(module: Any) -> EMFPipeline:
    """The pipeline of a loaded run, or of a ``FlowMapModule`` whose trainer has a datamodule.

    Raises:
        ValueError: for a module without either.
    """
    if module.pipeline is not None:
        pipeline: EMFPipeline = module.pipeline
        return pipeline
    data = getattr(module._trainer, "datamodule", None)
    if data is None:
        raise ValueError(
            "sample: the module has no datamodule, which encodes prompts and decodes latents: train it with "
            "trainer.fit(module, datamodule=...), or load a run with load_run(folder)"
        )
    attached = pipeline_of(module, data, str(module.trainer.precision))
    attached.set_progress_bar_config(disable=True)
    return attached.to(module.trainer.strategy.root_device)  # after a training the module itself lies on the CPU
