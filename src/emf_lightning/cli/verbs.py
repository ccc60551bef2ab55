"""Verbs of the command line and the help of each."""

from __future__ import annotations

TRAINER_VERBS = {
    "fit": "train an experiment",
    "validate": "score a checkpoint: the step sweep on the validation prompts",
    "test": "score it in full: step counts, guidance scales, with and without EMA, in one report",
    "predict": "generate images of prompts",
}
"""Verbs of Lightning's Trainer, run by ``EMFCLI``."""

FUNCTION_VERBS = {
    "experiments": "list the shipped experiments, with the question and the cost of each",
    "new": "copy a shipped experiment, to change it",
    "export": "write a trained model as a diffusers pipeline",
    "play": "show a model as a local web page: a prompt at 1, 2, 4 and 30 steps, beside its parent",
    "diagnose": "say where a run's few-step images of a shapes world fail, beside its parent's",
    "compare": "train experiments for the same time and compare their images",
    "images": "write an image data set of the Hugging Face hub as shards",
    "captions": "write a file of prompts as shards without images",
    "shards": "write caption-image shards of a shapes world",
    "score": "score a folder of images: GenEval, DPG-Bench, HPS, CLIP score, FID, KID",
    "encoders": "study text encoders: retrieval, removed words, and controls",
    "claim": "train on encoders of graded quality: do few steps suffer more?",
    "report": "put several runs into one table and one figure",
    "schema": "write a JSON schema of experiment files, by which editors complete and check them",
    "completion": "print a script by which the shell completes verbs and options",
}
"""Verbs without an experiment: ``emf NAME`` calls the function NAME of ``emf_lightning.cli.NAME`` with the options."""

EXPERIMENT_VERBS = {
    "cache": "compute an experiment's text features and latents ahead of training",
    "plan": "estimate an experiment's parameters, memory, disk and time",
}
"""Verbs that read an experiment but do not train: ``emf NAME`` calls NAME of ``emf_lightning.cli.NAME``."""

OWN_OPTIONS = {
    "cache": ("--dry_run",),
    "plan": (
        "--device",
        "--utilisation",
        "--samples",
        "--gpu-hour-price",
        "--terabyte-month-price",
        "--months",
    ),
}
"""Options of ``EXPERIMENT_VERBS`` beside those of ``fit``."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "fit": ("emf fit experiments/shapes/demo.yaml --trainer.max_steps 1000", "emf fit --run runs/shapes/demo"),
    "validate": (
        "emf validate --run runs/shapes/demo",
        "emf validate experiments/shapes/demo.yaml --ckpt_path none",
    ),
    "test": (
        "emf test --run runs/shapes/demo",
        "emf test --run runs/shapes/demo/version_0/checkpoints/last.ckpt",
    ),
    "predict": (
        'emf predict --run runs/shapes/demo --prompt "a photo of a red circle" --steps 1,2,4',
        "emf predict --run runs/shapes/demo --prompts prompts.txt --guidance_scale 1.5 --out pictures",
    ),
    "cache": (
        "emf cache experiments/shapes/demo.yaml --dry_run",
        "emf cache experiments/shapes/demo.yaml --data.cache.path cache/text",
    ),
    "plan": (
        "emf plan experiments/emf/blip3o_next.yaml",
        "emf plan experiments/emf/blip3o_next.yaml --device H200 --trainer.devices 16",
    ),
    "export": (
        "emf export --run runs/shapes/demo --out exported",
        "emf export runs/shapes/demo/version_0/checkpoints/last.ckpt --out exported",
    ),
    "play": ("emf play runs/shapes/demo", "emf play --run exported --port 7861"),
    "diagnose": (
        "emf diagnose runs/shapes/demo",
        "emf diagnose --run runs/shapes/emf --against runs/wider --images 1200 --out runs/diagnosis",
    ),
    "compare": (
        "emf compare experiments/shapes/emf.yaml experiments/shapes/fgm.yaml --minutes 30 --out runs/compare",
        "emf compare shapes/emf shapes/alpha_flow --overlays [parts/short_comparison] --seeds [0,1,2] --out runs/two",
    ),
    "images": (
        "emf images --dataset uoft-cs/cifar10 --out data/cifar10/train",
        "emf images --dataset korexyz/celeba-hq-256x256 --caption 'a photo of a face' --out data/celebahq/train",
    ),
    "captions": (
        "emf captions --prompts prompts.txt --out data/prompts",
        "emf captions prompts.txt --out data/prompts --samples_per_shard 1000",
    ),
    "shards": (
        "emf shards --world small --count 50000 --out data/shapes/small/train",
        "emf shards --world full --count 1000 --out data/shapes/full/validation",
    ),
    "score": (
        "emf score pictures --config experiments/scores/geneval.yaml",
        "emf score pictures --config experiments/scores/hps.yaml --files '*-4step[-.]*'",
    ),
    "encoders": (
        "emf encoders --config experiments/encoders/shapes.yaml",
        "emf encoders --encoders.words WordEncoder --queries 500 --out runs/encoders/words",
    ),
    "claim": ("emf claim --jobs 2", "emf claim --out runs/claim --train false"),
    "report": (
        "emf report runs/shapes/demo/version_0 --out runs/report",
        "emf report runs/shapes/demo/version_0 runs/shapes/emf/version_0",
    ),
    "new": ("emf new mine", "emf new mine --experiment emf/blip3o_next"),
    "schema": ("emf schema --out emf.schema.json", "emf schema encoders --out encoders.schema.json"),
    "completion": ("emf completion bash", "emf completion zsh"),
}
"""Verb -> two commands that its help shows."""


def examples(verb: str) -> str:
    """The examples of a verb, for its help."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES.get(verb, ()))])
