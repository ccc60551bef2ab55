"""`emf plan`: parameters, memory, disk and time of an experiment, before downloads and rented GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emf_lightning.cli.devices import DEVICES
from emf_lightning.cli.verbs import examples

HELP = f"""\
usage: emf plan EXPERIMENT.yaml [--device H100] [--utilisation 0.3] [--samples 170000] [options of emf fit]

Estimate an experiment before anything is downloaded or rented: parameters by part, memory of a device by strategy,
caches and checkpoints on disk, operations, time. Counts the network as it is built, without its weights.

--device          {", ".join(DEVICES)}: sets peak speed and memory
--utilisation     share of the peak speed that training reaches
--samples         number of training samples
"""


def plan(arguments: Sequence[str]) -> None:
    """Runs the verb with the arguments after ``emf plan``, one ``--config`` for each file."""
    parser = argparse.ArgumentParser(prog="emf plan", exit_on_error=False, add_help=False)
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--utilisation", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=170_000)
    own, rest = parser.parse_known_args(list(arguments))
    if not 0 < own.utilisation <= 1 or own.samples < 1:
        raise ValueError(f"utilisation must lie in (0, 1], samples be positive; got {own.utilisation}, {own.samples}")
    if not rest or {"-h", "--help"} & set(rest):
        print(f"{HELP}\n{examples('plan')}")
        return
    from emf_lightning.cli.estimate import Plan, PlanningCLI

    estimate = Plan(PlanningCLI.run(["fit", *rest]).settings, own.device, own.utilisation, own.samples)
    sections = (estimate.parameters(), estimate.memory(), estimate.disk(), estimate.time())
    print("\n\n".join("\n".join(lines) for lines in sections))
    if estimate.kind.trained_networks > 1:
        print(f"\n{estimate.kind.__name__} trains a second network, which is not counted")
