"""`emf plan`: what an experiment takes, before anyone rents a GPU or downloads weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import Namespace

from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.sizes import EncoderSize, NetworkCost, encoder_size, encoding_flops, network_cost, on_meta
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork

DEVICES = {"A100": (312, 80), "H100": (989, 80), "H200": (989, 141), "B200": (2250, 180)}
"""Name -> dense bf16 TFLOP/s and GB of memory, from the makers' data sheets."""

HELP = f"""\
usage: emf plan --config FILE [--device H100] [--utilisation 0.3] [--samples 170000] [options of emf fit]

Say what an experiment takes, before anything is downloaded or rented: parameters by part, memory of a device by
strategy, caches and checkpoints on disk, operations, time. Counted on the network as it is built, without its weights.

--device          {", ".join(DEVICES)}: whose peak speed and memory
--utilisation     share of that peak that training reaches
--samples         in the training data
"""

_WITH_DERIVATIVE = (".MeanFlow", ".ImprovedMeanFlow")
_ALONE = (*_WITH_DERIVATIVE, ".FlowMatching", ".EncoderTuning")
"""Objectives by what they compute; others train a second network beside the first."""

_DERIVATIVE = 1.99
"""Forward passes that du/dt of a row costs (`make bench` counts them)."""


class PlanningCLI(BuildingCLI):
    """Reads an experiment as `emf fit` does and builds nothing of it."""

    def instantiate_classes(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan supposes.

    Attributes:
        device: whose speed and memory.
        utilisation: share of its peak that training reaches.
        samples: in the training data.
    """

    device: str
    utilisation: float
    samples: int


def plan(arguments: Sequence[str]) -> None:
    """Runs the verb on what stands behind ``emf plan``, experiments expanded."""
    parser = argparse.ArgumentParser(prog="emf plan", exit_on_error=False, add_help=False)
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--utilisation", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=170_000)
    own, rest = parser.parse_known_args(list(arguments))
    if not 0 < own.utilisation <= 1 or own.samples < 1:
        raise ValueError(f"utilisation must lie in (0, 1], samples be positive; got {own.utilisation}, {own.samples}")
    if not rest or {"-h", "--help"} & set(rest):
        print(HELP, end="")
        return
    settings = PlanningCLI.run(["fit", *rest]).settings
    for line in report(settings, Assumptions(own.device, own.utilisation, own.samples)):
        print(line)


def report(settings: Namespace, given: Assumptions) -> list[str]:
    """The plan's lines.

    Args:
        settings: the experiment's configuration.
        given: what to suppose.
    """
    text = encoder_size(settings.data.text)
    autoencoder: Autoencoder = on_meta(settings.data.autoencoder, Autoencoder)
    side, channels = settings.data.resolution // autoencoder.downsampling, autoencoder.channels
    net: FlowMapNetwork = on_meta(
        settings.model.init_args.net,
        FlowMapNetwork,
        context_width=text.width,
        latent_channels=channels,
        latent_size=side,
    )
    cost = network_cost(net, (channels, side, side), text.length, text.width)
    devices = _devices(settings.trainer)
    sizes = _Sizes(settings, net, text, autoencoder, cost, devices)
    kind = settings.model.class_path
    second = f"{kind.rpartition('.')[2]} trains a second network, which is not counted"
    return [
        *sizes.parameters(),
        *sizes.memory(given),
        *sizes.disk(given),
        *sizes.time(given, encoding_flops(autoencoder, settings.data.resolution), (channels, side)),
        *([] if kind.endswith(_ALONE) else ["", second]),
    ]


def _devices(trainer: Namespace) -> int:
    devices = trainer.devices
    each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return each * trainer.num_nodes


@dataclass(frozen=True)
class _Sizes:
    settings: Namespace
    net: FlowMapNetwork
    text: EncoderSize
    autoencoder: Autoencoder
    cost: NetworkCost
    devices: int

    @property
    def total(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.net.parameters() if p.requires_grad)

    @property
    def tuned(self) -> int:
        """Parameters of a text encoder that trains, too."""
        return self.text.parameters if self.settings.model.class_path.endswith(".EncoderTuning") else 0

    @property
    def averages(self) -> bool:
        names = [callback.class_path for callback in self.settings.trainer.get("callbacks") or []]
        return any(name.endswith(("WeightEMA", "EMAWeightAveraging")) for name in names)

    def parameters(self) -> list[str]:
        net = self.settings.model.init_args.net
        autoencoder = sum(p.numel() for p in self.autoencoder.parameters())
        lines = [
            "Parameters",
            _row("network", f"{self.total:,}", f"{self.trainable:,} train"),
        ]
        parts: dict[str, list[int]] = {}
        for name, parameter in self.net.named_parameters():
            part = parts.setdefault(name.removeprefix("transformer.").partition(".")[0], [0, 0])
            part[0] += parameter.numel()
            part[1] += parameter.numel() * parameter.requires_grad
        lines += [_row(f"  {name}", f"{total:,}", f"{some:,} train") for name, (total, some) in parts.items()]
        lines += [
            _row("text encoder", f"{self.text.parameters:,}", "all train" if self.tuned else "frozen"),
            _row("autoencoder", f"{autoencoder:,}", "frozen"),
        ]
        if net.get("init_args.pretrained"):
            source = net.init_args.pretrained
            lines.append(_row("started from", str(getattr(source, "path", source))))
        return lines

    def memory(self, given: Assumptions) -> list[str]:
        trainer, model = self.settings.trainer, self.settings.model.init_args
        rows = self.settings.data.batch_size
        mixed = str(trainer.precision).endswith("-mixed")
        checkpointing = bool(model.net.get("init_args.gradient_checkpointing"))
        activations = (self.cost.block_activations if checkpointing else self.cost.activations) * rows
        teacher = 4 * self.total if model.get("velocity") == "teacher" else 0
        encoder = 0 if self.tuned else self.text.bytes  # it is there for captions that the cache does not hold
        frozen = teacher + encoder + sum(p.numel() * p.element_size() for p in self.autoencoder.parameters())
        average = 4 * (self.total + self.tuned) if self.averages else 0
        weights, trained = 4 * (self.total + self.tuned), self.trainable + self.tuned
        gradients, optimiser = 4 * trained, 8 * trained
        casts = 2 * (self.total + self.tuned) if mixed else 0
        passes = activations // 2 if mixed else activations
        block = max((4 * sum(p.numel() for p in b.parameters()) for b in self.net.blocks), default=weights)
        ddp = weights + 2 * gradients + optimiser + average + casts + passes + frozen
        whole = 20 * self.tuned  # the network alone is sharded; an encoder stays whole, with its gradients twice
        sharded_bytes = weights + gradients + optimiser + average - 16 * self.tuned
        fsdp = sharded_bytes // self.devices + whole + 2 * block + casts + passes + frozen
        room = DEVICES[given.device][1]
        sharded = isinstance(trainer.strategy, Namespace)
        chosen = "set to FSDP2" if sharded else "set to DDP" if self.devices > 1 else "one device"

        def fits(size: int) -> str:
            return "fits" if size < 0.9e9 * room else "does not fit"

        return [
            "",
            f"Memory of each of {self.devices} devices, {rows} rows on each ({given.device}: {room} GB; {chosen})",
            _row("weights, gradients, AdamW", _gb(weights + gradients + optimiser), "fp32"),
            *([_row("averages", _gb(average), "fp32")] if average else []),
            _row("frozen", _gb(frozen), "encoder, autoencoder" + (", teacher" if teacher else "")),
            _row(
                "activations", _gb(passes), "checkpointed" if checkpointing else "all; gradient_checkpointing keeps few"
            ),
            *([_row("weights cast to 16 bit", _gb(casts), "autocast's, during a step")] if casts else []),
            _row("in all, one device or DDP", _gb(ddp), fits(ddp)),
            _row(f"in all, FSDP2 over {self.devices}", _gb(fsdp), fits(fsdp)),
            _row("", "", "counted, not measured: allow a tenth and more for the allocator"),
        ]

    def disk(self, given: Assumptions) -> list[str]:
        data = self.settings.data
        side = data.resolution // self.autoencoder.downsampling
        sizes = {"cache": self.text.length * self.text.width, "latent_cache": self.autoencoder.channels * side**2}
        lines = ["", f"Disk ({given.samples:,} samples)"]
        for name, numbers in sizes.items():
            if (cache := data.get(name)) is None:
                lines.append(_row(f"data.{name}", "none", "computed each time"))
                continue
            cache = cache.get("init_args", cache)  # with a class_path where it was named, or could have been
            each = numbers * {"float32": 4, "float8": 1}.get(cache.dtype, 2)
            needed = each * given.samples / 1e9
            room = "within max_gb" if needed < cache.max_gb else f"--data.{name}.max_gb {needed * 1.02:.0f} holds them"
            lines.append(_row(f"data.{name}", _gb(needed * 1e9), f"{each / 1e6:.3g} MB each in {cache.dtype}; {room}"))
        all_weights, trained = self.total + self.tuned, self.trainable + self.tuned
        saved = 4 * all_weights + 8 * trained + (4 * all_weights if self.averages else 0)
        return [*lines, _row("a checkpoint", _gb(saved), "with the optimiser; two are kept")]

    def time(self, given: Assumptions, encoding: int, latents: tuple[int, int]) -> list[str]:
        trainer, data = self.settings.trainer, self.settings.data
        batch = data.batch_size * self.devices * trainer.accumulate_grad_batches
        images, share = trainer.max_steps * batch, _share(self.settings)
        again = bool(self.settings.model.init_args.net.get("init_args.gradient_checkpointing"))
        teacher = self.settings.model.init_args.get("velocity") == "teacher"
        row = self.cost.flops * (3 + again + teacher + share * _DERIVATIVE)
        row += 8 * self.tuned * self.text.length  # three passes, and one when the batch comes; two operations a weight
        encoded = "latents from the cache" if data.get("latent_cache") else "encoding the image"
        row += 0 if data.get("latent_cache") else encoding
        peak = DEVICES[given.device][0] * 1e12 * given.utilisation
        seconds = row * data.batch_size * trainer.accumulate_grad_batches / peak
        patch = getattr(getattr(self.net, "transformer", None), "config", {}).get("patch_size", 1)
        positions = (latents[1] // patch) ** 2
        days = seconds * trainer.max_steps / 86400
        return [
            "",
            "Training",
            _row("steps", f"{trainer.max_steps:,}", f"of {batch:,} rows: {images / given.samples:.1f} passes"),
            _row(
                "tokens",
                f"{images * positions:.3g}",
                f"of latents, {positions:,} a row; of text {images * self.text.length:.3g}",
            ),
            _row(
                "a row",
                f"{row / 1e12:.3g} TFLOP",
                f"{3 + again + teacher} passes, du/dt of {share:.0%} of the rows, {encoded}",
            ),
            _row(
                "a step",
                f"{seconds:.3g} s",
                f"{given.device} at {peak / 1e12:.0f} TFLOP/s, {given.utilisation:.0%} of its peak",
            ),
            _row(
                "in all",
                f"{days * 24:.3g} h" if days < 2 else f"{days:.3g} days",
                f"{days * 24 * self.devices:,.1f} GPU hours",
            ),
            _row("", "", "without waiting for data, filling the cache, scores and saving"),
        ]


def _share(settings: Namespace) -> float:
    """Mean share of the rows that take a derivative."""
    if not settings.model.class_path.endswith(_WITH_DERIVATIVE):
        return 0.0
    share = settings.model.get("init_args.times.init_args.interval_share")
    if share is None:
        return 0.25  # the samplers' own
    return float(share.start if share.end is None else (share.start + share.end) / 2)


def _row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<28} {value:>18}  {remark}".rstrip()


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
