"""Caption-image pairs of a shapes world for encoder studies."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from emf_lightning.data.shapes.scenes import Scene, training_scene
from emf_lightning.data.shapes.world import WORLDS
from emf_lightning.evaluation.encoders.pair_corpus import PairCorpus
from emf_lightning.evaluation.geneval.verdict import relations


class ShapesPairs(PairCorpus):
    """Training scenes of a shapes world; the similarity of two images is the exact one of their scenes.

    It is the F1 of two scenes' facts: the shape and the colour of each object, both together, and the relation of each
    two objects.

    Args:
        world: name of the world, ``small`` or ``full``.
        count: pairs.
        seed: of the scenes.
    """

    exhaustive = True

    def __init__(self, world: str = "small", count: int = 3000, seed: int = 0) -> None:
        if world not in WORLDS:
            raise ValueError(f"ShapesPairs: no world {world!r}; the worlds are {', '.join(WORLDS)}")
        if count < 2:
            raise ValueError(f"ShapesPairs: count must be at least 2, got {count}")
        self.world = WORLDS[world]
        rng = np.random.default_rng(seed)
        self.scenes = [training_scene(self.world, rng) for _ in range(count)]
        self.name = f"shapes {world}, {count:,} pairs, seed {seed}"
        self.captions = [scene.prompt.prompt for scene in self.scenes]
        self.owners = np.arange(count)

    @cached_property
    def _facts(self) -> NDArray[np.int64]:
        """Count of each fact in each scene, ``[N, facts]``."""
        counts = [facts_of(scene) for scene in self.scenes]
        facts = dict.fromkeys(fact for count in counts for fact in count)
        return np.array([[count[fact] for fact in facts] for count in counts])

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return self._facts.sum(1, dtype=np.int64)

    def similarity(self, query: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        counts = self._facts[query]
        present = np.flatnonzero(counts)  # a scene has a dozen of hundreds of facts
        common = np.minimum(counts[present], self._facts[np.ix_(others, present)]).sum(1)
        return 2 * common / (self._sizes[query] + self._sizes[others])

    def image(self, pair: int) -> NDArray[np.uint8]:
        return self.scenes[pair].render(self.world)


def facts_of(scene: Scene) -> Counter[tuple[str, ...]]:
    """Facts of a scene with their counts."""
    facts: Counter[tuple[str, ...]] = Counter()
    boxes = []
    for item in scene.objects:
        facts.update([("shape", item.shape), ("colour", item.colour), ("object", item.colour, item.shape)])
        (x, y), r = item.centre, item.radius
        boxes.append((x - r, y - r, x + r, y + r))
    for (a, box), (b, other_box) in permutations(zip(scene.objects, boxes, strict=True), 2):
        found = relations(box, other_box) & {"left of", "above"}
        facts.update([("relation", a.shape, relation, b.shape) for relation in found])
    return facts
