"""Shapes worlds: vocabulary, geometry, and the compositions held out from training."""

from __future__ import annotations

from dataclasses import dataclass

from emf_lightning.data.geneval_prompts import PALETTE

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")


@dataclass(frozen=True)
class World:
    """One shapes world: a canvas cut into ``grid`` x ``grid`` cells, each holding at most one flat shape.

    Attributes:
        name: selects the world on the command line.
        canvas: side of the square image in pixels; a multiple of ``grid``.
        grid: cells per side.
        shapes: class names, in the order that fixes their indices.
        colours: names out of ``PALETTE``, in the order that fixes their indices.
        radius: smallest and largest object radius, as a fraction of the cell's side.
        held_out_pairs: the (colour, shape) pairs that no training image shows.
        held_out_shape_pairs: the pairs of shapes that no training image shows together.
    """

    name: str
    canvas: int
    grid: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    radius: tuple[float, float]
    held_out_pairs: frozenset[tuple[str, str]]
    held_out_shape_pairs: frozenset[frozenset[str]]

    @property
    def cell(self) -> int:
        """Side of one cell in pixels."""
        return self.canvas // self.grid


SMALL = World(
    name="small",
    canvas=36,
    grid=3,
    shapes=SHAPES[:5],
    colours=("red", "yellow", "green", "blue", "purple", "pink", "black", "white"),
    radius=(0.33, 0.41),
    held_out_pairs=frozenset({("pink", "circle"), ("black", "square"), ("white", "triangle")}),
    held_out_shape_pairs=frozenset({frozenset({"circle", "cross"})}),
)
"""The world for laptops: 36 px, nine 12 px cells, 5 shapes x 8 colours."""

FULL = World(
    name="full",
    canvas=96,
    grid=3,
    shapes=SHAPES,
    colours=tuple(PALETTE),
    radius=(0.26, 0.40),
    held_out_pairs=frozenset((c, s) for i, c in enumerate(PALETTE) for j, s in enumerate(SHAPES) if (i - j) % 5 == 0),
    held_out_shape_pairs=frozenset(map(frozenset, zip(SHAPES[:4], SHAPES[4:], strict=True))),
)
"""GenEval's ten colours and all eight shapes at 96 px, for machines with a GPU."""

WORLDS: dict[str, World] = {world.name: world for world in (SMALL, FULL)}
