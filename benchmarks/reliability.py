"""Plants faults into runs and data, and writes the table of docs/reliability.md: tries, survived, lost.

Every try damages a copy of something that a healthy run wrote, kills or signals a command at a random moment, limits
the size of its files, or starts it twice. A try is *right* if the result equals the healthy one's (after the same
command was repeated, where it was interrupted), *refused* if the command ended with an error message, *counted* if the
samples that were left out were reported, *lost* if the result is wrong or incomplete without a word, and otherwise
*traceback* or *hung*.

`--tries 0.1` makes a tenth of the tries. A try's random numbers come from the number of the try alone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  imported once, before processes are forked

from benchmarks.damage_tries import OUTCOMES, Table, checkpoint_try, export_try, shard_try  # noqa: E402
from benchmarks.interruption_tries import HOWS, VERBS, Verb, interruption_try, prepare  # noqa: E402
from emf_lightning.evaluation.markdown import markdown_table  # noqa: E402

DOCUMENT = ROOT / "docs" / "reliability.md"
MARKS = ("<!-- measured by benchmarks/reliability.py -->", "<!-- end of what was measured -->")


def report(table: Table, seconds: float) -> None:
    """Writes the measured part of the page."""
    sums: Counter[str] = Counter()
    for counts in table.rows.values():
        sums.update(counts)
    rows = [
        [fault, f"{sum(counts.values()):,}", *(f"{counts[outcome]:,}" for outcome in OUTCOMES)]
        for fault, counts in (*table.rows.items(), ("**all**", sums))
    ]
    text = f"{markdown_table(['Fault', 'Tries', *OUTCOMES], rows)}\n\nMeasured in {seconds / 60:.0f} minutes.\n"
    page = DOCUMENT.read_text()
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")


def run(share: float, only: list[str]) -> Table:
    """All tries, each in a folder of its own."""
    table = Table()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        world.mkdir()
        healthy = prepare(world)
        kinds: dict[str, tuple[int, Callable[[Path, random.Random], None]]] = {
            "shard": (500, lambda place, rng: shard_try(table, place, rng)),
            "checkpoint": (300, lambda place, rng: checkpoint_try(table, place, rng, world)),
            "export": (120, lambda place, rng: export_try(table, place, rng, world)),
        }
        for verb in VERBS:
            for how, count in HOWS.items():

                def attempt(place: Path, rng: random.Random, verb: Verb = verb, how: str = how) -> None:
                    interruption_try(table, place, rng, world, verb, how, healthy[verb.name])

                kinds[f"{verb.name} {how}"] = count, attempt
        for kind, (count, attempt) in kinds.items():
            for number in range(max(1, round(count * share))):
                if only and not any(kind.startswith(name) for name in only):
                    break
                place = Path(folder, "try")
                place.mkdir()
                try:
                    attempt(place, random.Random(f"{kind} {number}"))
                finally:
                    shutil.rmtree(place)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=float, default=1.0, help="share of the tries")
    parser.add_argument("--only", nargs="*", default=[], help="kinds, e.g. shard, checkpoint, 'fit SIGKILL', export")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    began = time.monotonic()
    made = run(options.tries, options.only)
    for fault, counts in made.rows.items():
        print(f"{fault:45} {dict(counts)}")
    if not options.no_page:
        report(made, time.monotonic() - began)
    sys.exit(bool(made.bad))
