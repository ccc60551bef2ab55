"""diffusers' SANA with the second time input, by subclassing alone."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import SanaTransformer2DModel

from emf_lightning.networks.interval import AnchoredInterval, IntervalEmbedding, SummedInterval


class IntervalSanaTransformer(SanaTransformer2DModel):
    """``SanaTransformer2DModel`` whose time embedding also takes r, handed in as ``guidance``.

    Its parameters keep SANA's names; new ones are ``time_embed.interval.*``. It saves and loads in diffusers' format.
    """

    embedding_type: type[IntervalEmbedding] = AnchoredInterval

    @functools.wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]  # from_pretrained reads the configuration off this signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_embed = self.embedding_type(self.config.num_attention_heads * self.config.attention_head_dim)

    @classmethod
    def from_flow(cls, path: str, **kwargs: Any) -> IntervalSanaTransformer:
        """A model with published or own weights; where they know no interval, its embedding starts as t's copy.

        Raises:
            OSError: where ``path`` is no diffusers folder or hub name.
            ValueError: where its weights are not those that its configuration speaks of.
        """
        try:
            model, info = cls.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=False, **kwargs)
        except RuntimeError as error:  # a line for each weight of another size
            raise _other_weights(path, str(error).partition("\n")[2].partition("\n")[0].strip()) from error
        missing = [key for key in info["missing_keys"] if not key.startswith("time_embed.interval.")]
        if missing or info["unexpected_keys"]:
            raise _other_weights(path, f"missing {sorted(missing)[:3]}, surplus {sorted(info['unexpected_keys'])[:3]}")
        if info["missing_keys"]:
            model.time_embed.duplicate()
        return model.train()  # diffusers hands out models to sample with


class SummedIntervalSanaTransformer(IntervalSanaTransformer):
    """The same with EMF's plain sum of the two time embeddings."""

    embedding_type = SummedInterval


def _other_weights(path: str, difference: str) -> ValueError:
    return ValueError(
        f"{path}: its weights are not those of a SANA transformer with this configuration ({difference}); check the "
        "path and its config.json"
    )
