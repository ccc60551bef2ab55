"""The arguments of a call that users of diffusers know; the pipeline has a network that takes guidance from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.callbacks import PipelineCallback

from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.flow.sampling import EulerSampler, FlowMapSampler, MultistepSampler
from emf_lightning.part_classes import spec_of
from emf_lightning.pipeline import EMFPipeline

EARLIER = Path(__file__).parent / "earlier_versions" / "export"
PROMPT, OTHER = "a photo of a red circle", "a photo of a blue square"
OPTIONS = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def conditioned() -> EMFPipeline:
    """Guidance is a condition of its network."""
    pipe = EMFPipeline.from_pretrained(EARLIER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(conditioned) -> EMFPipeline:
    return pipeline(conditioned, FlowMapSampler())


def pipeline(conditioned: EMFPipeline, sampler: object) -> EMFPipeline:
    """Classifier-free guidance of the same parts."""
    settings = {"sampler": spec_of(sampler), "guidance": spec_of(ClassifierFreeGuidance())}
    pipe = EMFPipeline(**conditioned.components, **settings, guidance_scale=2.0, latent_size=36)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_leads_away_from_a_negative_prompt(pipe):
    plain = pipe([PROMPT, OTHER], **OPTIONS)
    empty = pipe([PROMPT, OTHER], negative_prompt="", **OPTIONS)
    one = pipe([PROMPT, OTHER], negative_prompt="a green cross", **OPTIONS)
    each = pipe([PROMPT, OTHER], negative_prompt=["a green cross", ""], num_images_per_prompt=2, **OPTIONS)
    assert torch.equal(plain.images, empty.images)
    assert not torch.allclose(plain.images, one.images, atol=1e-3)
    assert torch.allclose(each.images[0], one.images[0], atol=1e-5)
    assert torch.allclose(each.images[2], plain.images[1], atol=1e-5)
    assert one.nfe == 4


def test_a_prompt_as_its_own_negative_is_no_guidance(pipe):
    same = pipe(PROMPT, negative_prompt=PROMPT, **OPTIONS).images
    assert torch.allclose(same, pipe(PROMPT, guidance_scale=1.0, **OPTIONS).images, atol=1e-5)


def test_a_negative_prompt_that_nothing_reads_is_refused(pipe, conditioned):
    for one, options in ((pipe, {"guidance_scale": 1.0}), (conditioned, {})):
        with pytest.raises(ValueError, match=r"^negative_prompt: with guidance_scale=.* nothing would read it"):
            one(PROMPT, negative_prompt="a green cross", **options)
        one(PROMPT, negative_prompt="", **options, **OPTIONS)


@pytest.mark.parametrize("sampler", [FlowMapSampler(), EulerSampler(), MultistepSampler()])
def test_a_callback_sees_the_samples_of_each_step(conditioned, sampler):
    pipe, seen = pipeline(conditioned, sampler), []

    def note(given, step, t, tensors):
        seen.append((given is pipe, step, round(float(t), 3), tensors["latents"].clone()))
        return tensors

    last = pipe(PROMPT, num_inference_steps=4, output_type="latent", callback_on_step_end=note).images
    assert [row[:3] for row in seen] == [(True, 0, 1.0), (True, 1, 0.75), (True, 2, 0.5), (True, 3, 0.25)]
    assert torch.equal(seen[-1][3], last)
    assert torch.equal(pipe(PROMPT, num_inference_steps=4, output_type="latent").images, last)


@pytest.mark.parametrize("sampler", [FlowMapSampler(), EulerSampler(), MultistepSampler()])
def test_a_callback_may_replace_the_samples(conditioned, sampler):
    pipe = pipeline(conditioned, sampler)
    plain = pipe(PROMPT, **OPTIONS).images
    early = pipe(PROMPT, callback_on_step_end=lambda p, k, t, x: {"latents": x["latents"] + (k == 0)}, **OPTIONS).images
    late = pipe(PROMPT, callback_on_step_end=lambda p, k, t, x: {"latents": x["latents"] + (k == 1)}, **OPTIONS).images
    silent = pipe(PROMPT, callback_on_step_end=lambda *_: None, **OPTIONS).images
    assert torch.equal(late, plain + 1)
    assert torch.equal(silent, plain)
    assert not torch.allclose(early, plain, atol=1e-3)


def test_diffusers_own_kind_of_callback_works(pipe):
    class Shift(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] + (step_index == 1)}

    shifted = pipe(PROMPT, callback_on_step_end=Shift(cutoff_step_ratio=None, cutoff_step_index=1), **OPTIONS).images
    assert torch.equal(shifted, pipe(PROMPT, **OPTIONS).images + 1)


def test_each_image_may_have_its_own_generator(pipe):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe([PROMPT, OTHER], generator=generators(3, 4), **OPTIONS).images
    alone = pipe(OTHER, generator=generators(4), **OPTIONS).images
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    assert torch.equal(alone, pipe(OTHER, generator=generators(4)[0], **OPTIONS).images)
    several = pipe(PROMPT, num_images_per_prompt=2, generator=generators(3, 3), **OPTIONS).images
    assert torch.allclose(several[0], several[1], atol=1e-5)


def test_embeddings_may_stand_for_prompts(pipe):
    embeds, mask = pipe.encode_prompt([PROMPT, OTHER])
    noise = torch.randn(2, 3, 36, 36)
    given = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, latents=noise, **OPTIONS).images
    assert torch.equal(given, pipe([PROMPT, OTHER], latents=noise, **OPTIONS).images)
    assert pipe(prompt_embeds=embeds, **OPTIONS).images.isfinite().all()
    assert len(pipe(prompt_embeds=embeds, num_images_per_prompt=2, **OPTIONS).images) == 4


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_kinds_of_output_of_the_size_that_the_model_has(pipe, output_type):
    images = pipe([PROMPT] * 4, num_inference_steps=1, output_type=output_type, height=36, width=36).images
    assert len(images) == 4
    assert pipe([PROMPT] * 4, num_inference_steps=1, output_type=output_type, return_dict=False)[0] is not None


def test_the_sampler_is_there_to_see(pipe):
    assert pipe.sampler == FlowMapSampler()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": None}, "^prompt: NoneType is no text"),
        ({}, "^prompt: NoneType is no text"),
        ({"prompt": PROMPT, "height": 64}, "^height: this model generates images of 36 x 36 pixels alone, got 64$"),
        ({"prompt": PROMPT, "width": "wide"}, "^width: this model generates images of 36 x 36 pixels alone"),
        ({"prompt": PROMPT, "output_type": "jpg"}, "^output_type: must be one of pil, np, pt, latent, got 'jpg'$"),
        ({"prompt": PROMPT, "output_type": None}, "^output_type: must be one of"),
        ({"prompt": PROMPT, "num_inference_steps": None}, "num_inference_steps=None"),
        ({"prompt": PROMPT, "num_inference_steps": 1.5}, "num_inference_steps=1.5"),
        ({"prompt": PROMPT, "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt": PROMPT, "generator": []}, "^generator: must be one, or a list of one for each of 1 images, got 0$"),
        ({"prompt": [PROMPT] * 3, "generator": [torch.Generator()] * 2}, "for each of 3 images, got 2$"),
        ({"prompt": [PROMPT] * 3, "negative_prompt": ["", ""]}, "^negative_prompt: .* each of 3 prompts, got 2$"),
        ({"prompt": PROMPT, "negative_prompt": []}, "^negative_prompt: .* got 0$"),
        ({"prompt": PROMPT, "negative_prompt": 3}, "^negative_prompt: int is no text"),
        ({"prompt": PROMPT, "prompt_embeds": torch.zeros(1, 10, 8)}, "^prompt_embeds: prompt is given, too"),
        ({"prompt_embeds": torch.zeros(1, 10, 9)}, r"^prompt_embeds: must be \[B, 10, 8\], got \[1, 10, 9\]$"),
        ({"prompt_embeds": torch.zeros(10, 8)}, r"^prompt_embeds: must be \[B, 10, 8\], got \[10, 8\]$"),
        (
            {"prompt_embeds": torch.zeros(1, 10, 8), "prompt_attention_mask": torch.ones(1, 9)},
            "^prompt_attention_mask: must be",
        ),
        (
            {
                "prompt": PROMPT,
                "callback_on_step_end": print,
                "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
            },
            "^callback_on_step_end_tensor_inputs: a step has latents alone, got 'prompt_embeds'$",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_in_a_sentence(pipe, arguments, said):
    with pytest.raises(ValueError, match=said) as caught:
        pipe(**arguments)
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_is_encoded_as_one(pipe, monkeypatch):
    encoder, told = pipe.text_encoder.part, []
    monkeypatch.setattr(
        type(encoder), "encode_negative", lambda self, captions: told.append(captions) or self.encode(captions)
    )
    pipe(PROMPT, negative_prompt=OTHER, **OPTIONS)
    assert told == [[OTHER]]
