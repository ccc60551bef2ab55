"""A trained model as a diffusers pipeline: `emf export` writes it, ``EMFPipeline.from_pretrained`` loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from emf_lightning.call_arguments import (
    CALLBACK_TENSORS,
    check_counts,
    check_generators,
    check_output,
    given_features,
    negative_prompts,
    step_end_of,
)
from emf_lightning.data.cache.entry_format import EntryFormat
from emf_lightning.digests import check_digests, write_digests
from emf_lightning.earlier_exports import sampling_of_model
from emf_lightning.evaluation.fixed_noise import fixed_noise, noise_indices
from emf_lightning.exported_files import INDEX, check_folder
from emf_lightning.flow.guidance import SamplingGuidance
from emf_lightning.flow.sampling import Sampler, sample
from emf_lightning.hub import DOWNLOAD_OPTIONS, downloaded
from emf_lightning.part_classes import Spec, builder, trusting
from emf_lightning.pipeline_part import PipelinePart
from emf_lightning.remote_code import as_installed, carry_code
from emf_lightning.text.base import NULL_CAPTION, TextFeatures
from emf_lightning.text.plain import prompt_texts


class EMFPipelineOutput(BaseOutput):
    """Generated images and their cost.

    Attributes:
        images: PIL images, an array ``[B, H, W, 3]`` in [0, 1], or latents.
        nfe: network evaluations per image; guidance doubles the steps.
    """

    images: Any
    nfe: int


class EMFPipeline(DiffusionPipeline):
    """Images of prompts in 1, 2 or 4 steps::

        pipe = EMFPipeline.from_pretrained("path/to/export").to("cuda")
        pipe("a red circle", num_inference_steps=1).images[0]

    Args:
        transformer: the network, part of an experiment.
        vae: the autoencoder.
        text_encoder: the frozen text encoder.
        sampler: spec of the sampler, see ``emf_lightning.flow.sampling``.
        guidance: spec of the way in which a guidance scale acts, see ``emf_lightning.flow.guidance``.
        guidance_scale: the default; 1 is none.
        latent_size: H = W of the latents.
        autocast: precision of the network's passes where it is not that of the weights, e.g. ``bfloat16``.
        features: dtype to which the cache rounded the text features in training, e.g. ``bfloat16``.
        model: class and arguments of the LightningModule, in folders that earlier versions wrote.

    Example:
        >>> pipe = EMFPipeline.from_pretrained("export")
        >>> pipe("a photo of a red circle", num_inference_steps=1).nfe
        1
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: PipelinePart,
        vae: PipelinePart,
        text_encoder: PipelinePart,
        sampler: Spec | None = None,
        guidance: Spec | None = None,
        guidance_scale: float = 1.0,
        latent_size: int = 32,
        autocast: str | None = None,
        features: str | None = None,
        model: Spec | None = None,
    ) -> None:
        super().__init__()
        if model is not None:
            sampler, guidance, guidance_scale = sampling_of_model(model)
        if sampler is None or guidance is None:  # diffusers takes arguments without a default for parts
            raise ValueError("EMFPipeline: sampler is not set; from_pretrained reads it from an exported folder")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder)
        self.register_to_config(
            sampler=sampler,
            guidance=guidance,
            guidance_scale=guidance_scale,
            latent_size=latent_size,
            autocast=autocast,
            features=features,
            model=None,
        )
        self.image_processor = VaeImageProcessor()
        self._sampler: Sampler = builder(sampler, (Sampler,), f"{INDEX}: sampler")()
        self._guidance: SamplingGuidance = builder(guidance, (SamplingGuidance,), f"{INDEX}: guidance")()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, trust_remote_code: bool = False, **options: Any
    ) -> Any:
        """The pipeline in an exported folder, or in a repository of the hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            trust_remote_code: whether its files may name classes from outside this package: to load those runs code.
            **options: of diffusers' ``from_pretrained``, e.g. ``torch_dtype`` and ``revision``.

        Raises:
            ValueError: for a name that is neither; for files that name another class, unless they are trusted; for
                damaged files.
        """
        if isinstance(options.get("device_map"), str) and options["device_map"] in ("balanced", "auto"):
            raise ValueError(
                f"device_map: {options['device_map']!r} would split the parts; give one device, e.g. cuda, or call "
                "enable_model_cpu_offload() of the loaded pipeline"
            )
        places = {name: options.pop(name) for name in DOWNLOAD_OPTIONS if name in options}
        folder = downloaded(str(pretrained_model_name_or_path), **places)
        check_digests(folder)
        if not trust_remote_code:
            check_folder(folder)
        with trusting(trust_remote_code):
            return super().from_pretrained(str(folder), trust_remote_code=trust_remote_code, **options)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """The index of a folder; classes that its code imports from this package are named as they are here."""
        return as_installed(super().load_config(*arguments, **options))

    def save_config(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the index of a folder, and the code by which stock ``DiffusionPipeline`` loads it."""
        super().save_config(str(save_directory), **options)
        carry_code(Path(save_directory))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the folder that ``from_pretrained`` loads, with the digests of its files.

        Args:
            save_directory: the folder; weights of other variants in it stay.
            **options: of diffusers' ``save_pretrained``, e.g. ``variant="fp16"``.
        """
        super().save_pretrained(str(save_directory), **options)
        write_digests(Path(save_directory))

    @property
    def sampler(self) -> Sampler:
        """The way from noise to data, in place of diffusers' scheduler."""
        return self._sampler

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """``prompt_embeds`` ``[B, L, D]`` and ``prompt_attention_mask`` ``[B, L]`` of one or several prompts."""
        features = self._features(prompt_texts(prompt))
        return features.context, features.mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
    ) -> EMFPipelineOutput | tuple[Any]:
        """Images of ``prompt``, those of one prompt beside each other.

        Args:
            prompt: one or several; all of them are one batch. The empty string generates without a prompt.
            num_inference_steps: from noise to data; these models train for 1, 2 and 4.
            guidance_scale: of classifier-free guidance; by default the trained model's, 1 for none. It doubles the
                network evaluations, unless the network takes guidance as a condition.
            num_images_per_prompt: each from its own noise.
            seed: of the noise, a function of (seed, prompt, image index): the same as in `emf predict`, in any batch.
                A prompt that comes again in ``prompt`` goes on with the image index.
            generator: generates the noise instead; or a list with one for each image.
            latents: the noise itself, ``[B, C, H, W]``.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: whether to return an ``EMFPipelineOutput`` or a tuple.
            negative_prompt: what guidance leads away from, one or one a prompt; by default the empty caption.
            prompt_embeds: features ``[B, L, D]`` in place of ``prompt``, see ``encode_prompt``.
            prompt_attention_mask: ``[B, L]``, their tokens; by default all.
            height: of the images; the model's own alone.
            width: likewise.
            callback_on_step_end: called as ``callback(pipe, step, t, tensors)`` after each step, with t in [0, 1] at
                which the step began; may return a dictionary with other ``latents``.
            callback_on_step_end_tensor_inputs: names of ``tensors``; ``latents`` alone are there.

        Raises:
            ValueError: for an argument that does not fit, for nothing to generate, and for a prompt that is no text.
        """
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("prompt_embeds: prompt is given, too; leave one of them out")
        prompts = prompt_texts(prompt) if prompt_embeds is None else [NULL_CAPTION] * len(prompt_embeds)
        check_counts(len(prompts), num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        check_output(output_type, self.config.latent_size * self.vae.part.downsampling, height, width)
        step_end = step_end_of(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        device, scale = self._execution_device, self.config.guidance_scale if guidance_scale is None else guidance_scale
        evaluations = self._guidance.evaluations(scale)
        negatives = negative_prompts(negative_prompt, len(prompts), evaluations, scale)
        captions = [caption for caption in prompts for _ in range(num_images_per_prompt)]
        indices = list(range(num_images_per_prompt)) * len(prompts)
        noise = self._noise(captions, indices, seed, generator, latents).to(device)
        if prompt_embeds is None:
            text = self._features(prompts).to(device)
        else:
            encoder = self.text_encoder.part
            text = given_features(prompt_embeds, prompt_attention_mask, encoder.length, encoder.width).to(device)
        each = torch.arange(len(prompts), device=device).repeat_interleave(num_images_per_prompt)
        null = self._features(negatives, negative=True).to(device)
        if len(negatives) > 1:
            null = null[each]
        if hook := getattr(self.transformer, "_hf_hook", None):  # offloaded: the sampler calls the part itself
            hook.pre_forward(self.transformer)
        nfe = num_inference_steps * evaluations
        with self._progress(nfe), self._precision(device):
            generated = sample(
                self.transformer.part,
                noise,
                text[each].conditioning,
                steps=num_inference_steps,
                sampler=self._sampler,
                guidance_scale=scale,
                null_context=null.conditioning,
                guidance=self._guidance,
                step_end=step_end,
            )
        images: Any = generated
        if output_type != "latent":
            images = self.image_processor.postprocess(self.vae(generated.float()), output_type=output_type)
        self.maybe_free_model_hooks()
        return EMFPipelineOutput(images=images, nfe=nfe) if return_dict else (images,)

    def _features(self, captions: Sequence[str], negative: bool = False) -> TextFeatures:
        features: TextFeatures = self.text_encoder(captions, True) if negative else self.text_encoder(captions)
        if self.config.features is None:
            return features
        stored = EntryFormat(features.context.shape[1], features.context.shape[2], self.config.features)
        return TextFeatures(stored.rounded(features.context), features.mask)

    def _noise(
        self,
        captions: Sequence[str],
        indices: Sequence[int],
        seed: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        side = self.config.latent_size
        shape = (len(captions), self.vae.part.channels, side, side)
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"EMFPipeline: latents must be {list(shape)}, got {list(latents.shape)}")
            return latents.float()
        if generator is not None:
            check_generators(generator, len(captions))
            device = (generator if isinstance(generator, torch.Generator) else generator[0]).device
            return randn_tensor(shape, generator=generator, device=device)
        rows = list(zip(captions, indices, strict=True))
        numbers = zip(captions, noise_indices(rows), strict=True)
        return torch.stack([fixed_noise(seed, caption, index, shape[1:]) for caption, index in numbers])

    @contextmanager
    def _progress(self, nfe: int) -> Iterator[None]:
        """A progress bar over the network evaluations of a batch."""
        with self.progress_bar(total=nfe) as bar:

            def count(*_: Any) -> None:  # a hook that returned tqdm's bool would replace the output by it
                bar.update()

            handle = self.transformer.part.register_forward_hook(count)
            try:
                yield
            finally:
                handle.remove()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.config.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, getattr(torch, self.config.autocast))
