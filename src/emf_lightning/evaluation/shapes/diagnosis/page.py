"""The page of a diagnosis, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emf_lightning.evaluation.markdown import markdown_table
from emf_lightning.evaluation.shapes.diagnosis.estimates import Mean
from emf_lightning.evaluation.shapes.diagnosis.failures import CORRECT, KINDS, MIXED

_INTRODUCTION = """\
Every model sampled the same prompts from the same noise. A number is a share of images ± its standard error by
bootstrap over prompts, unless its heading says otherwise; a share of 0 or 1 has an error of 0, whatever the number of
images. The kinds of failures exclude one another; the first that fits counts."""


def page(numbers: Mapping[str, Any], fewest: Sequence[str]) -> str:
    """The page of ``Diagnosis.numbers``; ``fewest`` are the titles of the samples of the fewest steps."""
    shares = numbers["shares"]
    head = markdown_table(("", ""), [(name, value) for name, value in numbers["about"].items()])
    parts = ["# Diagnosis of few-step images", head, _INTRODUCTION, "## Models and step counts"]
    groups = [name for name in ("all", "seen", "held-out") if name in next(iter(shares.values()))]
    parts.append(
        markdown_table(
            ("correct images", *groups),
            [(title, *(_cell(of[group][CORRECT]) for group in groups)) for title, of in shares.items()],
        )
    )
    parts += ["## Kinds of failures", _kinds_table("model", {title: of["all"] for title, of in shares.items()})]
    parts.append("\n".join(f"- {kind}: {definition}" for kind, definition in KINDS.items()))
    for title in fewest:
        parts += [f"## Where it fails: {title}", _kinds_table("group", shares[title], counted=True)]
    parts += ["## Agreement with the parent's image of the same noise", _agreement(numbers)]
    parts += ["## Variance relative to the parent's", _variance(numbers["variance"])]
    if numbers["boundary"] is not None:
        parts += ["## Error by the distance of the noise to a boundary between two layouts", _boundary(numbers)]
    parts += ["## Worst images", "![The worst images beside the parent's](diagnosis.png)"]
    return "\n\n".join(parts) + "\n"


def _kinds_table(first: str, rows: Mapping[str, Mapping[str, Mean]], counted: bool = False) -> str:
    columns = (first, *(["images"] if counted else []), CORRECT, *KINDS)
    body = []
    for name, found in rows.items():
        count = [str(found[CORRECT].images)] if counted else []
        body.append((name, *count, *(_cell(found[kind]) for kind in (CORRECT, *KINDS))))
    return markdown_table(columns, body)


def _agreement(numbers: Mapping[str, Any]) -> str:
    near, rows = numbers["near"], []
    for title, found in numbers["agreement"].items():
        if found:
            rows.append((title, _cell(found["near"]), _cell(found["same layout"]), f"{found['median distance']:.3f}"))
    table = markdown_table(("model", f"within {near:g}", "same layout", "median distance"), rows)
    return (
        f"{table}\n\nThe distance is the root mean square over pixels and colours, in [0, 1]. Layouts are the same if "
        "as many regions are found, of the same shapes and colours, with centres at most "
        f"{numbers['reach']:g} pixels apart. `other noise` compares two of the parent's images of one prompt: chance."
    )


def _variance(variances: Mapping[str, Mapping[str, Mean]]) -> str:
    names = list(next(iter(variances.values())))
    table = markdown_table(
        ("model", *names), [(title, *(_cell(of[name]) for name in names)) for title, of in variances.items()]
    )
    return f"{table}\n\nVariance of a pixel, a mean over pixels and colours, as a multiple of the parent's."


def _boundary(numbers: Mapping[str, Any]) -> str:
    found, rows = numbers["boundary"], []
    for name, of in found["bins"].items():
        for title, errors in of["models"].items():
            count = str(errors["fails"].images)
            cells = (_cell(errors[key]) for key in ("fails", "mixed", "another layout", "distance"))
            rows.append((name, count, title, *cells, _cell(of["parent fails"])))
    columns = ("distance", "images", "model", "fails", "mixed", "another layout", "distance to the parent's")
    sizes = ", ".join(f"{size:g}" for size in found["sizes"])
    return (
        f"{markdown_table((*columns, 'parent fails'), rows)}\n\nThe distance of noise e is the first size s of {sizes} "
        f"at which the parent's image of sqrt(1 - s²) e + s d has another layout than that of e, for one of "
        f"{found['directions']} random unit normal directions d. Mixed are the kinds {', '.join(MIXED)}."
    )


def _cell(mean: Mean) -> str:
    return "0" if mean.value == 0 else str(mean)
