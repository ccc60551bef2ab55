"""`emf plan`: parameters, memory, disk and time of an experiment, before downloads and rented GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emf_lightning.cli.devices import DEVICES
from emf_lightning.cli.verbs import OWN_OPTIONS, examples

HELP = f"""\
usage: emf plan EXPERIMENT.yaml [--device H100] [--utilisation 0.3] [--samples 170000] [options of emf fit]

Estimate an experiment before anything is downloaded or rented: parameters by part, memory of a device by strategy,
caches and checkpoints on disk, operations, time, and whether storing text features pays. Encoders and networks are
built without their weights; a step's passes are counted by taking it with a stand-in for the network.

--device                 {", ".join(DEVICES)}: sets peak speed and memory
--utilisation            share of the peak speed that training and encoding reach
--samples                number of training samples
--gpu-hour-price         of a GPU hour, in any currency; 3 by default
--terabyte-month-price   of a TB on disk for a month; 80 by default, a rented SSD's
--months                 for which stored features are kept; 1 by default
"""


def plan(arguments: Sequence[str]) -> None:
    """Runs the verb with the arguments after ``emf plan``, one ``--config`` for each file."""
    parser = argparse.ArgumentParser(prog="emf plan", exit_on_error=False, add_help=False)
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--utilisation", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=170_000)
    prices = {"gpu_hour": 3.0, "terabyte_month": 80.0, "months": 1.0}
    for name, option in zip(prices, OWN_OPTIONS["plan"][3:], strict=True):
        parser.add_argument(option, type=float, default=prices[name], dest=name)
    own, rest = parser.parse_known_args(list(arguments))
    if not 0 < own.utilisation <= 1 or own.samples < 1:
        raise ValueError(f"utilisation must lie in (0, 1], samples be positive; got {own.utilisation}, {own.samples}")
    if not all(0 <= vars(own)[name] < float("inf") for name in prices):
        given = ", ".join(f"{vars(own)[name]:g}" for name in prices)
        raise ValueError(f"{', '.join(OWN_OPTIONS['plan'][3:])} must not be negative, got {given}")
    if not rest or {"-h", "--help"} & set(rest):
        print(f"{HELP}\n{examples('plan')}")
        return
    from emf_lightning.cli.assumptions import PlanningCLI
    from emf_lightning.cli.estimate import Plan
    from emf_lightning.cli.worth import Prices

    settings = PlanningCLI.run(["fit", *rest]).settings
    estimate = Plan(settings, own.device, own.utilisation, own.samples)
    money = Prices(*(vars(own)[name] for name in prices))
    sections = [estimate.parameters(), estimate.memory(), estimate.disk(), estimate.time(), estimate.worth(money)]
    print("\n\n".join("\n".join(lines) for lines in [*sections, estimate.notes] if lines))
