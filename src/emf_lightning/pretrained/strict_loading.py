"""Networks of transformers whose parts all came from their weights."""

from __future__ import annotations

from typing import Any


def load_strict(asker: str, kind: Any, model: str, remedy: str, unused: tuple[str, ...] = (), **arguments: Any) -> Any:
    """A network of class ``kind``, frozen, in eval mode.

    transformers itself fills what a checkpoint lacks with random numbers and goes on.

    Args:
        asker: what messages begin with.
        kind: the class, one of transformers'.
        model: hub name or local folder; a name for messages alone where ``arguments`` bring a ``state_dict``.
        remedy: what messages end with.
        unused: parts of names of weights without a say in the output, which a checkpoint may lack.
        **arguments: of ``from_pretrained``.

    Raises:
        ValueError: where it cannot be loaded, or its weights lack a part or are of other shapes.
    """
    source = None if "state_dict" in arguments else model
    try:
        network, report = kind.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{asker}: cannot load model={model!r} ({reason}); {remedy}") from error
    lost = [name for name in report["missing_keys"] if not any(part in name for part in unused)]
    lost += [name for name, *_ in report["mismatched_keys"]]
    if lost:
        raise ValueError(
            f"{asker}: model={model!r} lacks {len(lost)} of the weights of a {kind.__name__}, {min(lost)} among them, "
            f"or has them in other shapes: it is incomplete, or something else; {remedy}"
        )
    return network.eval().requires_grad_(False)
