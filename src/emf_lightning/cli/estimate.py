"""An experiment's parameters, memory, disk and time, counted from its settings."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.devices import DEVICES
from emf_lightning.cli.parsing.builder import BuildingCLI
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.sizes import encoder_size, encoding_flops, network_cost, on_meta
from emf_lightning.latents.base import Autoencoder
from emf_lightning.networks.base import FlowMapNetwork

_DERIVATIVE = 1.99
"""Forward passes of one sample's du/dt (`make bench` measures them)."""


class PlanningCLI(BuildingCLI):
    """Reads an experiment as `emf fit` does and builds nothing."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""


class Plan:
    """Estimate of an experiment of ``samples`` training samples, on a device of ``DEVICES`` at a share of its speed."""

    def __init__(self, settings: Namespace, device: str, utilisation: float, samples: int) -> None:
        self.settings, self.device, self.utilisation, self.samples = settings, device, utilisation, samples
        kind: Any = class_of(settings.model.class_path)
        self.kind = kind
        self.derivative = _derivative_share(settings.model)
        velocity = settings.model.get("init_args.objective.init_args.velocity.class_path")
        self.teacher = velocity is not None and getattr(class_of(velocity), "needs_teacher", False)
        self.text = encoder_size(settings.data.text)
        self.autoencoder: Autoencoder = on_meta(settings.data.autoencoder, Autoencoder)
        self.side = settings.data.resolution // self.autoencoder.downsampling
        channels = self.autoencoder.channels
        sizes = {"context_width": self.text.width, "latent_channels": channels, "latent_size": self.side}
        self.net: FlowMapNetwork = on_meta(settings.model.init_args.net, FlowMapNetwork, **sizes)
        self.cost = network_cost(self.net, (channels, self.side, self.side), self.text.length, self.text.width)
        trainer, net = settings.trainer, settings.model.init_args.net
        given = len(trainer.devices) if isinstance(trainer.devices, list) else str(trainer.devices)
        self.devices = (int(given) if str(given).isdigit() else 1) * trainer.num_nodes
        self.checkpointing = bool(net.get("init_args.gradient_checkpointing"))
        self.pretrained = net.get("init_args.pretrained.path", net.get("init_args.pretrained"))
        names = [callback.class_path for callback in trainer.get("callbacks") or []]
        self.averages = any(name.endswith(("WeightEMA", "EMAWeightAveraging")) for name in names)
        own = any(name.endswith("WeightEMA") for name in names)
        self.network = sum(p.numel() for p in self.net.parameters())
        self.tuned = self.text.parameters if kind.tunes_encoder else 0
        self.weights = self.network + self.tuned
        self.adapter = getattr(self.net, "adapter", None)
        parents = self.net.parent_weights  # copies and checkpoints leave them out
        self.copied = sum(p.numel() for name, p in self.net.named_parameters() if name not in parents)
        self.trainable = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        self.averaged = (self.copied + self.tuned if own else self.weights) * self.averages

    def parameters(self) -> list[str]:
        """Parameters by part."""
        parts: dict[str, list[int]] = {}
        for name, parameter in self.net.named_parameters():
            part = parts.setdefault(name.removeprefix("transformer.").removeprefix("model.").partition(".")[0], [0, 0])
            part[0] += parameter.numel()
            part[1] += parameter.numel() * parameter.requires_grad
        autoencoder = sum(p.numel() for p in self.autoencoder.parameters())
        return [
            "Parameters",
            _row("network", f"{self.network:,}", f"{self.trainable:,} train"),
            *(_row(f"  {name}", f"{total:,}", f"{some:,} train") for name, (total, some) in parts.items()),
            *([self._adapters()] if self.adapter is not None else []),
            _row("text encoder", f"{self.text.parameters:,}", "all train" if self.tuned else "frozen"),
            _row("autoencoder", f"{autoencoder:,}", "frozen"),
            *([_row("started from", str(self.pretrained))] if self.pretrained else []),
        ]

    def _adapters(self) -> str:
        rank, share = self.adapter.rank, self.trainable / self.network
        return _row("adapters", f"rank {rank}", f"{share:.2%} of the network train, intervals' embedding among them")

    def memory(self) -> list[str]:
        """Memory of a device, by strategy."""
        trainer, batch = self.settings.trainer, self.settings.data.batch_size
        mixed = str(trainer.precision).endswith("-mixed")
        activations = (self.cost.block_activations if self.checkpointing else self.cost.activations) * batch
        teacher = 4 * self.copied * self.teacher
        encoder = 0 if self.tuned else self.text.bytes  # encodes captions that the cache does not hold
        frozen = teacher + encoder + sum(p.numel() * p.element_size() for p in self.autoencoder.parameters())
        average = 4 * self.averaged
        gradients = 4 * (self.trainable + self.tuned)
        states = 4 * self.weights + 3 * gradients  # weights, gradients and AdamW's two moments
        casts = 2 * self.weights * mixed
        passes = activations // 2 if mixed else activations
        block = max((4 * sum(p.numel() for p in b.parameters()) for b in self.net.blocks), default=4 * self.weights)
        ddp = states + gradients + average + casts + passes + frozen
        whole = 20 * self.tuned  # FSDP2 shards the network only; an encoder stays whole, with its gradients twice
        sharded = (states + average - 16 * self.tuned) // self.devices
        fsdp = sharded + whole + 2 * block + casts + passes + frozen
        room = DEVICES[self.device][1]
        is_sharded = isinstance(trainer.strategy, Namespace)
        chosen = "set to FSDP2" if is_sharded else "set to DDP" if self.devices > 1 else "one device"
        kept = "checkpointed" if self.checkpointing else "all; gradient_checkpointing keeps few"
        fits = {size: "fits" if size < 0.9e9 * room else "does not fit" for size in (ddp, fsdp)}
        return [
            f"Memory of each of {self.devices} devices, {batch} rows on each ({self.device}: {room} GB; {chosen})",
            _row("weights, gradients, AdamW", _gb(states), "fp32"),
            *([_row("averages", _gb(average), "fp32")] if average else []),
            _row("frozen", _gb(frozen), "encoder, autoencoder" + (", teacher" if teacher else "")),
            _row("activations", _gb(passes), kept),
            *([_row("weights cast to 16 bit", _gb(casts), "autocast's, during a step")] if casts else []),
            _row("in all, one device or DDP", _gb(ddp), fits[ddp]),
            _row(f"in all, FSDP2 over {self.devices}", _gb(fsdp), fits[fsdp]),
            _row("", "", "counted, not measured: allow a tenth and more for the allocator"),
        ]

    def disk(self) -> list[str]:
        """Caches and checkpoints."""
        sizes = {"cache": self.text.length * self.text.width, "latent_cache": self.autoencoder.channels * self.side**2}
        lines = [f"Disk ({self.samples:,} samples)"]
        for name, numbers in sizes.items():
            if (cache := self.settings.data.get(name)) is None:
                lines.append(_row(f"data.{name}", "none", "computed each time"))
                continue
            cache = cache.get("init_args", cache)  # a class_path is optional here
            each = numbers * {"float32": 4, "float8": 1}.get(cache.dtype, 2)
            needed = each * self.samples / 1e9
            room = "within max_gb" if needed < cache.max_gb else f"--data.{name}.max_gb {needed * 1.02:.0f} holds them"
            lines.append(_row(f"data.{name}", _gb(needed * 1e9), f"{each / 1e6:.3g} MB each in {cache.dtype}; {room}"))
        whole = self.copied + self.tuned
        saved = 4 * whole * (1 + self.averages) + 8 * (self.trainable + self.tuned)
        return [*lines, _row("a checkpoint", _gb(saved), "with the optimiser; two are kept")]

    def time(self) -> list[str]:
        """Steps, operations and duration."""
        trainer, data = self.settings.trainer, self.settings.data
        batch = data.batch_size * self.devices * trainer.accumulate_grad_batches
        images = trainer.max_steps * batch
        passes = 3 + self.checkpointing + self.teacher - (self.adapter is not None)  # no gradients of frozen weights
        row = self.cost.flops * (passes + self.derivative * _DERIVATIVE)
        row += 8 * self.tuned * self.text.length  # four passes, one of them for the features; two operations a weight
        row += 0 if data.get("latent_cache") else encoding_flops(self.autoencoder, data.resolution)
        encoded = "latents from the cache" if data.get("latent_cache") else "encoding the image"
        work = f"{passes} passes, du/dt of {self.derivative:.0%} of the rows, {encoded}"
        peak = DEVICES[self.device][0] * 1e12 * self.utilisation
        seconds = row * data.batch_size * trainer.accumulate_grad_batches / peak
        days = seconds * trainer.max_steps / 86400
        patch = getattr(getattr(self.net, "transformer", None), "config", {}).get("patch_size", 1)
        positions = (self.side // patch) ** 2
        tokens = f"of latents, {positions:,} a row; of text {images * self.text.length:.3g}"
        speed = f"{self.device} at {peak / 1e12:.0f} TFLOP/s, {self.utilisation:.0%} of its peak"
        duration = f"{days * 24:.3g} h" if days < 2 else f"{days:.3g} days"
        return [
            "Training",
            _row("steps", f"{trainer.max_steps:,}", f"of {batch:,} rows: {images / self.samples:.1f} passes"),
            _row("tokens", f"{images * positions:.3g}", tokens),
            _row("a row", f"{row / 1e12:.3g} TFLOP", work),
            _row("a step", f"{seconds:.3g} s", speed),
            _row("in all", duration, f"{days * 24 * self.devices:,.1f} GPU hours"),
            _row("", "", "without waiting for data, filling the cache, scores and saving"),
        ]


def _derivative_share(model: Namespace) -> float:
    """Mean share of the samples that take du/dt; the objective is MeanFlow by default, unless two models train."""
    kind: Any = class_of(model.class_path)
    objective = model.get("init_args.objective.class_path")
    if objective is None:
        takes_derivative = kind.trained_networks == 1 and not kind.tunes_encoder
    else:
        takes_derivative = getattr(class_of(objective), "takes_derivative", False)
    ratio = model.get("init_args.objective.init_args.times.init_args.flow_matching_ratio")
    mean = 0.75 if ratio is None else (ratio.start + (ratio.start if ratio.end is None else ratio.end)) / 2
    return takes_derivative * (1 - mean)


def _row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<28} {value:>18}  {remark}".rstrip()


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
