"""Verbs of the command line and the help of each."""

from __future__ import annotations

TRAINER_VERBS = {
    "fit": "train an experiment",
    "validate": "score a checkpoint: the step sweep on the validation prompts",
    "test": "score it in full: step counts, guidance scales, with and without EMA, in one report",
    "predict": "generate images for a file of prompts",
}
"""Verbs of Lightning's Trainer, run by ``EMFCLI``."""

FUNCTION_VERBS = {
    "experiments": "list the shipped experiments, with the question and the cost of each",
    "new": "copy a shipped experiment, to change it",
    "export": "write a trained model as a diffusers pipeline",
    "compare": "train experiments for the same time and compare their images",
    "images": "write an image data set of the Hugging Face hub as shards",
    "captions": "write a file of prompts as shards without images",
    "shards": "write caption-image shards of a shapes world",
    "score": "score a folder of images: GenEval, DPG-Bench, HPS, CLIP score, FID, KID",
    "encoders": "study text encoders: retrieval, removed words, and controls",
    "claim": "train on encoders of graded quality: do few steps suffer more?",
    "report": "put several runs into one table and one figure",
}
"""Verbs without an experiment: ``emf NAME`` calls the function NAME of ``emf_lightning.cli.NAME`` with the options."""

EXPERIMENT_VERBS = {
    "cache": "compute an experiment's text features and latents ahead of training",
    "plan": "estimate an experiment's parameters, memory, disk and time",
}
"""Verbs that read an experiment but do not train: ``emf NAME`` calls NAME of ``emf_lightning.cli.NAME``."""
