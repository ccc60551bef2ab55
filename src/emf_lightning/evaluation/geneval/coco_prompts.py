"""GenEval's own 553 prompts, sampled again by the published procedure (arXiv 2310.11513)."""

from __future__ import annotations

from emf_lightning.data.geneval_prompts import PALETTE, Prompt, sample_prompts

# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""COCO's 80 thing classes in its order, which numbers a detector's labels; three have GenEval's names."""


def geneval_prompts() -> list[Prompt]:
    """The 553 records of GenEval's ``evaluation_metadata.jsonl``, in its order.

    The class "person" never gets a colour. The published scores use 4 images of each prompt, 2,212 in all.
    """
    prompts = sample_prompts(CLASSES, tuple(PALETTE), per_task=100, seed=43, colourless=1)
    return list({repr(prompt): prompt for prompt in prompts}.values())
