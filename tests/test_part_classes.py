"""Parts of an exported folder, built again from their specs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from torch import nn

from emf_lightning.flow.guidance import ClassifierFreeGuidance
from emf_lightning.part_classes import builder, plain, spec_of, trusting


class Mixing(Enum):
    ADD = "a"
    SCALE = "s"


@dataclass(frozen=True)
class Width:
    hidden: int = 8
    mixing: Mixing = Mixing.ADD


class Typed(nn.Module):
    def __init__(
        self,
        width: Width = Width(),
        mixing: Mixing | None = None,
        file: Path | None = None,
        kernel: tuple[int, int] = (1, 1),
        names: frozenset[str] = frozenset(),
        layers: list[Width] | None = None,
        by_name: dict[str, Path] | None = None,
        inner: nn.Module | None = None,
        activation: Callable[[float], float] = math.exp,
        layer: type[nn.Module] = nn.Linear,
        untyped=None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.arguments = (width, mixing, file, kernel, names, layers, by_name, activation, layer, untyped)


@dataclass(frozen=True)
class Halfway(ClassifierFreeGuidance):
    mixing: Mixing = Mixing.ADD
    width: Width = Width()


def rebuilt(kind: type, **arguments: object) -> object:
    """An object of ``kind`` from its spec, which was written to a file and read again."""
    spec = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": plain(arguments)}
    with trusting(True):
        return builder(json.loads(json.dumps(spec)), (object,), "here")()


def test_arguments_come_back_as_what_the_constructor_is_annotated_with():
    written = {"hidden": 3, "mixing": Mixing.SCALE}  # a dataclass, as the parser holds it
    found = rebuilt(
        Typed,
        width=written,
        mixing=Mixing.SCALE,
        file=Path("a/b.txt"),
        kernel=(3, 5),
        names={"x"},
        layers=[written],
        by_name={"one": Path("c")},
        activation=math.sqrt,
        layer=nn.Conv2d,
        untyped={"left": [1]},
    )
    width = Width(3, Mixing.SCALE)
    plain_ones = (width, Mixing.SCALE, Path("a/b.txt"), (3, 5), frozenset("x"), [width], {"one": Path("c")})
    assert found.arguments == (*plain_ones, math.sqrt, nn.Conv2d, {"left": [1]})
    assert type(found.arguments[4]) is frozenset


def test_arguments_that_were_left_out_are_the_defaults():
    assert rebuilt(Typed).arguments[:4] == (Width(), None, None, (1, 1))


def test_a_part_within_a_part_is_built_once():
    found = rebuilt(Typed, inner={"class_path": f"{__name__}.Typed", "init_args": {"mixing": "SCALE"}})
    assert isinstance(found.inner, Typed) and found.inner.arguments[1] is Mixing.SCALE


def test_settings_of_ones_own_come_back():
    settings = Halfway(mixing=Mixing.SCALE, width=Width(5))
    spec = json.loads(json.dumps(spec_of(settings)))
    with trusting(True):
        assert builder(spec, (object,), "here")() == settings


def test_a_constructor_that_refuses_its_arguments_is_named():
    with pytest.raises(ValueError, match=r"here: .*unexpected keyword argument 'heads'; export the run again"):
        rebuilt(Typed, heads=3)
