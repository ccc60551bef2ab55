"""A local web page that samples one prompt at several step counts: that of `emf play`, and of an export's app.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling

from emf_lightning.data.prompt_list import PromptList
from emf_lightning.evaluation.sampling_config import step_name
from emf_lightning.pipeline import EMFPipeline
from emf_lightning.text.plain import shorten

STEPS = (1, 2, 4, 30)
PARENT_STEPS = 30

PROMPTS = "prompts.txt"
"""File of an exported folder: prompts that the page offers, one a line."""

APP = '''\
"""The model in this folder as a web page: `python app.py`, or a Gradio Space of the Hugging Face hub."""

from pathlib import Path

from emf_lightning.play import exported_model, page, serve

demo = page(exported_model(Path(__file__).parent{options}))

if __name__ == "__main__":
    serve(demo)
'''
"""app.py of an exported folder."""

_SHOWN = 256  # pixels: smaller images are enlarged, each pixel to a square

_HOUR = 3600  # after which images that were shown are deleted


@dataclass(frozen=True)
class PlayedModel:
    """A model and its parent, as the page shows them.

    Attributes:
        name: heading of the page.
        pipeline: of the model.
        prompts: examples; the page samples the first when it is opened.
        parent: pipeline of the model that it was trained from.
        remark: a sentence on the parent.
    """

    name: str
    pipeline: EMFPipeline
    prompts: Sequence[str] = ()
    parent: EMFPipeline | None = None
    remark: str = ""

    @property
    def headings(self) -> list[str]:
        """Headings of the images, from left to right."""
        return [*map(step_name, STEPS), *([] if self.parent is None else [f"parent, {step_name(PARENT_STEPS)}"])]

    def to(self, device: str | None = None) -> PlayedModel:
        """Moves the parts to ``device``, by default to CUDA where there is one, and returns this object."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        for pipeline in filter(None, (self.pipeline, self.parent)):
            pipeline.set_progress_bar_config(disable=True)
            pipeline.to(device)
        return self


@dataclass(frozen=True)
class Drawn:
    """An image and its cost.

    Attributes:
        image: as the model generated it.
        seconds: from the prompt to the image.
        nfe: network evaluations.
        guidance_scale: 1 is none.
    """

    image: Image
    seconds: float
    nfe: int
    guidance_scale: float

    @property
    def caption(self) -> str:
        """Time, evaluations and guidance in words."""
        guidance = "" if self.guidance_scale == 1 else f", guidance {self.guidance_scale:g}"
        return f"{self.seconds:.3g} s, {self.nfe} evaluation{'s' * (self.nfe > 1)}{guidance}"

    @property
    def shown(self) -> Image:
        """The image, enlarged if it is small."""
        factor = max(1, _SHOWN // max(self.image.size))
        return self.image.resize((self.image.width * factor, self.image.height * factor), Resampling.NEAREST)


def draw(
    model: PlayedModel,
    prompt: str,
    seed: float | None = 0,
    guidance: float | None = None,
    parent_guidance: float | None = None,
) -> Iterator[Drawn]:
    """Images of the same noise, one by one: ``STEPS`` of the model, then the parent's.

    Args:
        model: to sample from.
        prompt: the empty string samples without a prompt.
        seed: of the noise, a whole number.
        guidance: guidance scale of the model; by default its own.
        parent_guidance: that of the parent; by default its own.

    Raises:
        ValueError: for a seed that is no whole number, and for what the pipeline refuses.
    """
    if seed is None or seed != int(seed):
        raise ValueError(f"seed: {seed} is no whole number; give one, e.g. 0")
    wanted = [(model.pipeline, steps, guidance) for steps in STEPS]
    if model.parent is not None:
        wanted.append((model.parent, PARENT_STEPS, parent_guidance))
    for pipeline, steps, scale in wanted:
        scale = pipeline.config.guidance_scale if scale is None else scale
        began = time.perf_counter()
        output: Any = pipeline(prompt, num_inference_steps=steps, guidance_scale=scale, seed=int(seed))
        yield Drawn(output.images[0], time.perf_counter() - began, output.nfe, scale)


def exported_model(
    folder: Path, device: str | None = None, trust_remote_code: bool = False, parent: str | Path | None = None
) -> PlayedModel:
    """The model in an exported folder, which holds no parent.

    Args:
        folder: the exported folder.
        device: see ``PlayedModel.to``.
        trust_remote_code: see ``EMFPipeline.from_pretrained``, also for the parent.
        parent: exported folder of the model that it was trained from, or its name on the hub. One that cannot be loaded
            is left out, with the reason on the page.
    """
    pipeline = EMFPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code)
    prompts = PromptList(folder / PROMPTS).prompts if (folder / PROMPTS).is_file() else []
    remark, beside = "An exported folder holds no parent; `emf play` with the run shows it beside the model.", None
    if parent is not None:
        try:
            beside = _same_noise(pipeline, EMFPipeline.from_pretrained(parent, trust_remote_code=trust_remote_code))
            remark = f"The parent is {parent if isinstance(parent, str) else parent.name}."
        except (OSError, ValueError) as error:
            remark = f"The parent is left out: {shorten(str(error), 200)}"
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    title = next((line[2:] for line in card.splitlines() if line.startswith("# ")), folder.resolve().name)
    return PlayedModel(title, pipeline, prompts, beside, remark).to(device)


def _same_noise(pipeline: EMFPipeline, parent: EMFPipeline) -> EMFPipeline:
    """``parent``; raises ValueError if its noise has another shape than that of ``pipeline``."""
    ours, theirs = ((one.vae.part.channels, one.config.latent_size) for one in (pipeline, parent))
    if ours != theirs:
        raise ValueError(
            f"its latents have {theirs[0]} channels and {theirs[1]} positions a side, those of the model {ours[0]} and "
            f"{ours[1]}, so the two cannot start from the same noise"
        )
    return parent


def page(model: PlayedModel) -> Any:
    """The page, as Gradio's ``Blocks``; its API has one endpoint, ``/draw``.

    Raises:
        ValueError: if Gradio is not installed.
    """
    check_gradio()
    import gradio as gr

    for pipeline in filter(None, (model.pipeline, model.parent)):
        pipeline("", num_inference_steps=1)  # the first pass of a process is slow: not in the first image's time

    def drawn(*inputs: Any) -> Iterator[list[Any]]:
        cells: list[Any] = [None, ""] * len(model.headings)
        yield cells
        try:
            for number, one in enumerate(draw(model, *inputs)):
                cells[2 * number : 2 * number + 2] = one.shown, one.caption
                yield cells
        except ValueError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=f"emf play {model.name}", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as blocks:
        gr.Markdown(f"## {model.name}\nThe same noise at each number of steps. {model.remark}")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(next(iter(model.prompts), ""), label="prompt", scale=6)
            seed = gr.Number(0, label="seed", precision=0, min_width=80)
            inputs = [prompt, seed, gr.Number(model.pipeline.config.guidance_scale, label="guidance", min_width=80)]
            if model.parent is not None:
                own = model.parent.config.guidance_scale
                inputs.append(gr.Number(own, label="parent's guidance", min_width=80))
            button = gr.Button("Sample", variant="primary", min_width=80)
        cells: list[Any] = []
        with gr.Row():
            for heading in model.headings:
                with gr.Column(min_width=160):
                    gr.Markdown(f"**{heading}**")
                    settings = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                    cells.append(gr.Image(label=heading, show_label=False, height=_SHOWN, **settings))
                    cells.append(gr.Markdown())
        if model.prompts:
            gr.Examples([[text] for text in model.prompts], [prompt], cache_examples=False)
        triggers = [button.click, prompt.submit, *([blocks.load] if model.prompts else [])]
        gr.on(triggers, drawn, inputs, cells, api_name="draw", show_progress="minimal")
    return blocks


def serve(blocks: Any, host: str | None = None, port: int | None = None) -> None:
    """Serves ``page`` until it is interrupted: by default on this machine alone, at the first free port from 7860.

    Raises:
        ValueError: for a port that is taken, and for another machine's address.
    """
    try:
        blocks.launch(server_name=host, server_port=port, share=False, ssr_mode=False, footer_links=["api"])
    except OSError as error:
        place = f"{port or 'no free port'} at {host or 'this machine'}"
        raise ValueError(f"port: {place} cannot be taken; give another, or none for the first free one") from error


def check_gradio() -> None:
    """Raises ValueError if Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError("the page needs the package gradio, which is not installed: pip install 'emf_lightning[play]'")
