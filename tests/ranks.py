"""What test_devices.py looks at: the same training on one process and on two, each in several ways.

``main`` forks the ranks, with the environment that torchrun would give them, and each run leaves ``<name>.pt`` in the
folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from emf_lightning.callbacks import (
    FewStepSampling,
    RunSummary,
    SampleWriter,
    SaveNetwork,
    SelfCheck,
    TrainingLog,
    WeightEMA,
)
from emf_lightning.callbacks.sampling.sampling_context import averaged_weights, sampling_context
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.evaluation.shapes.suite import ShapesSuite
from emf_lightning.flow.guidance import TargetGuidance
from emf_lightning.flow.objectives.flow_generator_matching import FlowGeneratorMatching
from emf_lightning.flow.objectives.meanflow import MeanFlow
from emf_lightning.flow.objectives.self_corrected import ConsistencyTerms, SelfCorrectedFlow, VelocityConsistency
from emf_lightning.flow.target_velocity import TeacherVelocity
from emf_lightning.flow.times import Schedule, Times, TimeSampler
from emf_lightning.modules.alternating import AlternatingModule, Alternation
from emf_lightning.modules.fgm import FGM
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.modules.optimization import Optimization
from emf_lightning.modules.scflow import SCFlow
from emf_lightning.networks.discriminator import ConvDiscriminator
from emf_lightning.networks.prediction import PredictData
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap
from emf_lightning.text.words import WordEncoder
from tests.callbacks import tiny

STEPS = 4
ROWS = 4
"""Rows a rank and step; the first half has r < t."""

TINY = SanaArchitecture(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    patch_size=4,
)
Place = tuple[int, int]
"""(rank, row): which of a step's rows it is."""

OWN = [[(rank, row) for row in range(ROWS)] for rank in range(2)]
JOINED = [*OWN[0][: ROWS // 2], *OWN[1][: ROWS // 2], *OWN[0][ROWS // 2 :], *OWN[1][ROWS // 2 :]]
"""The rows of both ranks in one batch, r < t rows first."""


class Batches(Dataset):
    """Batch k holds step ``first`` + k's rows at ``places``, or its part of them where gradients are accumulated."""

    def __init__(self, places: list[Place], parts: int = 1, first: int = 0) -> None:
        self.places, self.parts, self.first = places, parts, first
        self.encoder = WordEncoder(width=16, length=4)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> CaptionImageBatch:
        step, part = self.first + index // self.parts, index % self.parts
        places = self.places[part :: self.parts]
        captions = tuple(("a red circle", "a blue square", "two circles")[(rank + row) % 3] for rank, row in places)
        x = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(64 * step + 8 * r + i)) for r, i in places]
        return CaptionImageBatch(torch.stack(x), self.encoder(captions), self.encoder([""]), captions)


class GivenTimes(TimeSampler):
    """Times that are the row's, whichever process it is on."""

    def __init__(self, places: list[Place], parts: int) -> None:
        super().__init__(Schedule(0.5))
        self.places, self.parts, self.calls = places, parts, 0

    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def __call__(self, rows: int, progress: float, device: torch.device) -> Times:
        places = self.places[self.calls % self.parts :: self.parts]
        self.calls += 1
        t = torch.tensor([0.2 + 0.09 * (rank * ROWS + row) for rank, row in places], dtype=torch.float32)
        n = sum(row < ROWS // 2 for _, row in places)
        return Times(r=torch.where(torch.arange(rows) < n, t / 3, t), t=t, n_interval=n)


def whole(state: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    named = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state if t is not None}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


class Found(Callback):
    """What a run leaves: the first gradient, the last weights and averages, and latents sampled from the averages."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def on_train_start(self, trainer, module):
        dtypes = self.values["times"] = []

        def look(embedding, args, kwargs):
            dtypes.extend(str(time.dtype) for time in (args[0], *module.net.two_times._times))

        module.net.transformer.time_embed.register_forward_pre_hook(look, with_kwargs=True)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if "gradient" not in self.values:
            self.values["gradient"] = whole((name, p.grad) for name, p in module.net.named_parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step < trainer.max_steps:
            return
        self.values["weights"] = whole(module.net.named_parameters())
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
        with sampling_context(trainer, module):  # rank 0's first rows come first in the joined batch, too
            self.values["latents"] = module.sample_latents(batch.text, batch.null, noise, 2)[: ROWS // 2]
        with averaged_weights(trainer, module) as there:
            if there:
                self.values["averages"] = whole(module.net.named_parameters())
        self.values["after"] = whole(module.net.named_parameters())

    def on_train_end(self, trainer, module):
        self.values["logged"] = {name: float(value) for name, value in trainer.callback_metrics.items()}


def network(**arguments: Any) -> SanaFlowMap:
    torch.manual_seed(0)
    return SanaFlowMap(TINY, prediction=PredictData(), time_scale=10.0, latent_size=8, context_width=16, **arguments)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)  # AdamW's first steps are signs: rounding would show


def fit(module: LightningModule, batches: Dataset, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    """Trains on the CPU, on ``batches``, with noise that is the row's whichever process takes it."""
    quiet: dict[str, Any] = {"use_distributed_sampler": False, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(**({"max_steps": STEPS, "accelerator": "cpu", "devices": 1} | quiet | settings))
    with patch("torch.randn_like", lambda x: x.roll(1, -1)):
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def train(
    out: Path,
    name: str,
    places: list[Place],
    *callbacks: Callback,
    net: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> None:
    """Trains on ``places`` and leaves ``<name>.pt``."""
    parts = settings.get("accumulate_grad_batches", 1)
    arguments = {"times": GivenTimes(places, parts), **(model or {})}
    optimization, gather_once = Optimization(arguments.pop("optimizer", sgd)), arguments.pop("gather_once", False)
    module, found = (
        FlowMapModule(
            network(**net or {}),
            MeanFlow(**arguments),
            optimization=optimization,
            caption_dropout=0.0,
            gather_once=gather_once,
        ),
        Found(),
    )
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options: dict[str, Any] = {"gradient_clip_val": 0.5, "enable_checkpointing": checkpoints}
    options |= {"default_root_dir": out / name, "callbacks": [TrainingLog(), *callbacks, found]}
    data = Batches(places, parts, first=2 if ckpt_path else 0)  # a plain loader does not know where it was
    trainer = fit(module, data, ckpt_path, **(options | settings))
    if trainer.is_global_zero:
        torch.save(found.values, out / f"{name}.pt")


def sharded(ranks: int, one_file: bool = True) -> dict[str, Any]:
    strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=not one_file)
    return {"strategy": strategy, "devices": ranks}


def replicated() -> dict[str, Any]:
    return {"strategy": DDPStrategy(), "devices": 2}


TEACHER = {"velocity": TeacherVelocity(), "guidance": TargetGuidance(scale=2.0)}


def saver(out: Path, name: str) -> ModelCheckpoint:
    return ModelCheckpoint(out / name, "{step}", every_n_train_steps=2, save_top_k=-1)


class Kill(Callback):
    """No process survives the third step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class Odd(ShapesSuite):
    """Five tasks: three images of each are too many for two ranks to have as many."""

    def prompts(self):
        return [prompt for prompt in super().prompts() if prompt.tag != "counting"]


def stream(out: Path, name: str, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> None:
    """The real thing: captions and images from shards, noise and times by (seed, rank, step), AdamW."""
    found = Found()
    enabled = {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    trainer = tiny.trainer(out / name, *callbacks, found, **enabled, **settings)
    trainer.fit(tiny.meanflow(), datamodule=tiny.data(out / "shards"), ckpt_path=ckpt_path)
    if trainer.is_global_zero:
        torch.save(found.values, out / f"{name}.pt")


class OneTime(TimeSampler):
    """t = .6 in every row."""

    def __init__(self) -> None:
        super().__init__(Schedule(1.0))

    def sample(self, batch: int, progress: float, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.full((batch,), 0.6), torch.full((batch,), 0.6)


def fgm() -> FGM:
    return FGM(
        network(),
        FlowGeneratorMatching(times=OneTime(), generator_time=0.7),
        optimization=Optimization(sgd),
        alternation=Alternation(auxiliary_updates=2, gradient_clip_val=0.5),
    )


def scflow() -> SCFlow:
    return SCFlow(
        network(),
        lambda net: ConvDiscriminator(net, 4, 8, mbstd_group_size=1),
        SelfCorrectedFlow(consistency=OneStep(truncation=0.0), times=OneTime()),
        optimization=Optimization(sgd),
        alternation=Alternation(gradient_clip_val=0.5),
    )


class OneStep(VelocityConsistency):
    """Steps of one length, whichever row it is."""

    def __call__(self, *arguments: Any, **settings: Any) -> ConsistencyTerms:
        with patch("torch.rand", torch.ones):
            return super().__call__(*arguments, **settings)


def _in_parts(module: AlternatingModule) -> AlternatingModule:
    module.micro_batches = 2
    return module


def in_turn(out: Path, name: str, places: list[Place], module: AlternatingModule, **settings: Any) -> None:
    """Trains two networks in turn on ``places``, and leaves the weights of both."""
    options = {"default_root_dir": out / name, "callbacks": [TrainingLog(), SelfCheck()]}
    trainer = fit(module, Batches(places), **(options | settings))
    if trainer.is_global_zero:
        torch.save({"weights": whole(module.named_parameters())}, out / f"{name}.pt")


def alone(rank: int, out: Path) -> None:
    in_turn(out, "fgm-alone", JOINED, fgm())
    in_turn(out, "scflow-alone", JOINED, scflow())
    train(out, "alone", JOINED, WeightEMA(decay=0.5), SaveNetwork())
    train(out, "alone-lightning", JOINED, EMAWeightAveraging(decay=0.5))
    train(out, "alone-teacher", JOINED, model=TEACHER)


def together(rank: int, out: Path) -> None:
    own = OWN[rank]
    in_turn(out, "fgm-ddp", own, fgm(), **replicated())
    in_turn(out, "scflow-ddp", own, scflow(), **replicated())
    in_turn(out, "fgm-ddp-parts", own, _in_parts(fgm()), **replicated())
    train(out, "ddp", own, WeightEMA(decay=0.5), SaveNetwork(), **replicated())
    train(out, "ddp-lightning", own, EMAWeightAveraging(decay=0.5), **replicated())
    train(out, "ddp-teacher", own, model=TEACHER, net={"gradient_checkpointing": True}, **replicated())
    train(out, "ddp-accumulated", own, accumulate_grad_batches=2, **replicated())
    train(out, "fsdp2", own, WeightEMA(decay=0.5), SaveNetwork(), saver(out, "one"), **sharded(2))
    train(out, "fsdp2-parts", own, WeightEMA(decay=0.5), saver(out, "parts"), **sharded(2, one_file=False))
    train(out, "fsdp2-teacher", own, model=TEACHER, net={"gradient_checkpointing": True}, **sharded(2))
    train(out, "fsdp2-once", own, model={"gather_once": True}, net={"gradient_checkpointing": True}, **sharded(2))
    train(out, "fsdp2-mixed", own, precision="bf16-mixed", **sharded(2))
    train(out, "fsdp2-accumulated", own, accumulate_grad_batches=2, **sharded(2))
    stream(out, "unwatched", WeightEMA(decay=0.5), **sharded(2))
    watch = FewStepSampling(
        Odd(per_task=6, scenes_per_task=6),
        steps=[1, 2],
        every_n_steps=2,
        images_per_task=3,
        final_images_per_task=3,
        batch_size=5,
        figures=False,
    )
    check = SelfCheck()
    stream(out, "watched", WeightEMA(decay=0.5), check, watch, **sharded(2))
    (out / f"check-{rank}.txt").write_text(check.message)
    stream(out, "unkilled", WeightEMA(decay=0.5), **replicated())


def complaint(attempt: Callable[[], None]) -> str:
    """The user's error that ``attempt`` ends in."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


class ShardedByItself(FlowMapModule):
    """A module that trusts the automatic mesh, as ``ModelParallelStrategy``'s documentation shows it."""

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def refused(rank: int, out: Path) -> None:
    def auto() -> dict[str, Any]:
        return {"strategy": ModelParallelStrategy(), "devices": 2}

    (out / "prompts.txt").write_text("a red circle\na blue square\n")
    data = tiny.data(out / "shards", prompts=out / "prompts.txt")
    apart = ShardedByItself(tiny.network())
    predicting = tiny.trainer(out / "predicting", SampleWriter(), **sharded(2))
    said = {
        "auto": complaint(lambda: train(out, "auto", OWN[rank], **auto())),
        "apart": complaint(lambda: tiny.trainer(out / "apart", SelfCheck(), **auto()).fit(apart, datamodule=data)),
        "averages": complaint(lambda: train(out, "averages", OWN[rank], EMAWeightAveraging(), **sharded(2))),
        "alternating": complaint(lambda: in_turn(out, "alternating", OWN[rank], fgm(), **sharded(2))),
        "summary": complaint(
            lambda: train(out, "summary", OWN[rank], RunSummary(ShapesSuite(per_task=2)), **sharded(2))
        ),
        "prediction": complaint(lambda: predicting.predict(tiny.meanflow(), datamodule=data)),
    }
    if rank == 0:
        (out / "refused.json").write_text(json.dumps(said))


def killed(rank: int, out: Path) -> None:
    stream(out, "killed", WeightEMA(decay=0.5), saver(out, "killed"), Kill(), **replicated())


def resumed_together(rank: int, out: Path) -> None:
    own = OWN[rank]
    stream(out, "killed", WeightEMA(decay=0.5), ckpt_path=out / "killed" / "step=2.ckpt", **replicated())
    for name in ("one", "parts"):
        path = out / name / "step=2.ckpt"
        train(out, f"two-from-{name}", own, WeightEMA(decay=0.5), ckpt_path=path, **sharded(2, name == "one"))


def resumed_alone(rank: int, out: Path) -> None:
    train(out, "one-from-one", JOINED, WeightEMA(decay=0.5), ckpt_path=out / "one" / "step=2.ckpt")
    path = out / "parts" / "step=2.ckpt"
    train(out, "one-from-parts", JOINED, WeightEMA(decay=0.5), ckpt_path=path, **sharded(1))


def run(ranks: int, part: Callable[[int, Path], None], out: Path) -> list[int]:
    """The exit statuses of ``ranks`` processes that do ``part``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        status = 1
        try:
            part(rank, out)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return [os.waitpid(child, 0)[1] for child in children]


def main(folder: Path) -> None:
    """All runs, in a process that has run nothing: no rank inherits an autograd engine that has."""
    tiny.shards(folder / "shards")
    parts = ((1, alone), (2, together), (2, refused), (2, killed), (2, resumed_together), (1, resumed_alone))
    (folder / "statuses.json").write_text(
        json.dumps({part.__name__: run(ranks, part, folder) for ranks, part in parts})
    )
