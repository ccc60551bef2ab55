"""`emf cache`: computes text features and latents of an experiment's shards ahead of training."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from emf_lightning.cli.verbs import examples

if TYPE_CHECKING:  # the help needs none of them
    import torch

    from emf_lightning.data.cache_filling import CacheFiller

HELP = """\
usage: emf cache EXPERIMENT.yaml [--dry_run] [options of emf fit]

Compute the text features and the latents that the experiment will train on, into data.cache and data.latent_cache.
Of several captions of an image it computes all, as training takes another one in each pass.
First prints the size in each dtype, with the rounding error (of more than 8,192 samples, or 64 shards, the number is
an estimate: counting all would read the shards twice); then writes all missing entries. Repeat a call that was
interrupted: it continues. `emf fit` reads the caches, and computes entries that are still missing.

On several GPUs:  torchrun --nproc_per_node 8 -m emf_lightning cache --config FILE
Each process takes its share of the samples; all write to the same folder on a local disk.

--dry_run         encode one batch, print the sizes, write nothing
--data.cache.path, --data.cache.max_gb, --data.cache.dtype, --data.latent_cache.path, ...: as for emf fit --help
"""


def cache(arguments: list[str]) -> None:
    """Runs ``emf cache`` with its ``arguments``, experiments expanded."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"{HELP}\n{examples('cache')}")
        return
    from emf_lightning.cli.parsing.builder import DataCLI
    from emf_lightning.data.cache_filling import CacheFiller

    dry = "--dry_run" in arguments
    data = DataCLI.run(["fit", *(argument for argument in arguments if argument != "--dry_run")]).datamodule
    # Each machine fills caches of its own: LMDB serves one. SLURM_STEP_* are set by srun only, other SLURM_* variables
    # also in a batch script's single process.
    everywhere = _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)
    of_torchrun = os.environ.get("LOCAL_WORLD_SIZE")
    machines = everywhere // int(of_torchrun) if of_torchrun else int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    ranks, left = divmod(everywhere, machines)
    if left:
        raise ValueError(f"emf cache: {everywhere} processes on {machines} machines; start equally many on each")
    rank = _number("LOCAL_RANK", "SLURM_LOCALID", _number("RANK", "SLURM_PROCID", 0) % ranks)
    filler = CacheFiller(data, _device(), rank, ranks, machines)
    samples = filler.count()
    if rank == 0:
        _announce(filler, samples, ranks, machines)
    filler.check(samples)
    if not dry:
        _fill(filler, max(filler.entries(samples).values()) // ranks, rank)


def _number(torchrun: str, slurm: str, default: int) -> int:
    return int(os.environ.get(torchrun, os.environ.get(slurm, default)))


def _device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _number("LOCAL_RANK", "SLURM_LOCALID", 0) % torch.cuda.device_count())


def _announce(filler: CacheFiller, samples: int, ranks: int, machines: int) -> None:
    from emf_lightning.data.cache.entry_cache import format_bytes

    if ranks > 1:
        of_each = f" of each of {machines} machines" if machines > 1 else ""
        print(f"{ranks} processes{of_each} take a part of the samples each")
    began = time.perf_counter()
    options = filler.options(samples)
    for name, choices in options.items():
        number = filler.entries(samples)[name]
        about = "" if number == samples else f", {number:,} captions"
        print(f"{name} of {samples:,} samples{about}, by dtype:")
        for choice in choices:
            chosen = choice.dtype == filler.caches[name].dtype and choice.token_pool == 1
            how = choice.dtype if choice.token_pool == 1 else f"{choice.dtype}, token_pool {choice.token_pool}"
            mark = "  <- chosen" if chosen else ""
            print(f"  {how:<22} {format_bytes(choice.size):>9}   relative error {choice.error:.2%}{mark}")
    print(f"one batch of {filler.data.batch_size} took {time.perf_counter() - began:.3g} s on {filler.device}")
    for name, sentence in filler.check(samples).items():
        print(f"{name}: {sentence}")


def _fill(filler: CacheFiller, samples: int, rank: int) -> None:
    state = None
    with tqdm(desc="caches", total=samples, unit="sample", disable=rank > 0, delay=0.1) as bar:
        for state in filler.fill():
            bar.update(state.done + state.present - bar.n)
    if state is None:
        return
    left_out = ", ".join(f"{count} x {reason}" for reason, count in sorted(state.skipped.items()))
    rate = f", {state.done / state.seconds:.3g} a second" if state.done else ""
    who = f"rank {rank}: " if rank else ""
    print(f"{who}{state.done:,} samples written{rate}; {state.present:,} were there; left out: {left_out or 'none'}")
