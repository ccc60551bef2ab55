"""An experiment's parameters, memory, disk and time, counted from its settings."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from emf_lightning.cli.assumptions import sized_or_assumed
from emf_lightning.cli.devices import DEVICES, devices_of_node
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.passes import Passes, StepPasses, step_passes
from emf_lightning.cli.rows import gb, row
from emf_lightning.cli.sizes import discriminator_size, encoder_size, encoding_flops, network_cost
from emf_lightning.cli.worth import SCALES, Prices, worth
from emf_lightning.data.cache.entry_format import EntryFormat, gigabytes
from emf_lightning.latents.base import Autoencoder
from emf_lightning.modules.alternating import AlternatingModule
from emf_lightning.modules.generation import AUTOCAST
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.text.base import TextEncoder

_DERIVATIVE = 1.99
"""Forward passes of one sample's du/dt (`make bench` measures them)."""


class Plan:
    """Estimate of an experiment of ``samples`` training samples, on a device of ``DEVICES`` at a share of its speed.

    Attributes:
        notes: a sentence for each thing that was assumed.
    """

    def __init__(self, settings: Namespace, device: str, utilisation: float, samples: int) -> None:
        self.settings, self.device, self.utilisation, self.samples = settings, device, utilisation, samples
        self.notes: list[str] = []
        kind: Any = class_of(settings.model.class_path)
        data, net, trainer = settings.data, settings.model.init_args.net, settings.trainer
        self.text = encoder_size(self._sized("data.text", data.text, TextEncoder))
        self.autoencoder: Autoencoder = self._sized("data.autoencoder", data.autoencoder, Autoencoder)
        self.side = data.resolution // self.autoencoder.downsampling
        channels = self.autoencoder.channels
        sizes = {"context_width": self.text.width, "latent_channels": channels, "latent_size": self.side}
        self.net: FlowMapNetwork = self._sized("model.init_args.net", net, FlowMapNetwork, **sizes)
        shape = channels, self.side, self.side
        self.cost = network_cost(self.net, shape, self.text.length, self.text.width)
        if (devices := devices_of_node(trainer.devices)) is None:
            self.notes.append(f"trainer.devices {trainer.devices}: planned with 1 device a node")
        self.devices = (devices or 1) * trainer.num_nodes
        if str(trainer.precision) in ("32", "32-true"):
            self.notes.append(
                f"trainer.precision {trainer.precision}: the time is that of 16-bit arithmetic; fp32 takes twice as "
                "long for convolutions, which cuDNN computes in TF32, and up to 15 times for other layers"
            )
        self.checkpointing = bool(net.get("init_args.gradient_checkpointing"))
        self.pretrained = net.get("init_args.pretrained.path", net.get("init_args.pretrained"))
        names = [callback.class_path for callback in trainer.get("callbacks") or []]
        self.averages = any(name.endswith(("WeightEMA", "EMAWeightAveraging")) for name in names)
        own = any(name.endswith("WeightEMA") for name in names)
        self.passes = self._passes(channels)
        critic = settings.model.init_args.get("discriminator")
        self.critic, self.critic_flops = (
            (0, 0) if critic is None else discriminator_size(critic, self.net, shape, self.text.width)
        )
        self.network = sum(p.numel() for p in self.net.parameters())
        self.tuned = self.text.parameters if kind.tunes_encoder else 0
        self.several = kind.__name__ if kind.tunes_encoder or issubclass(kind, AlternatingModule) else ""
        self.adapter = getattr(self.net, "adapter", None)
        parents = self.net.parent_weights  # copies and checkpoints leave them out
        self.copied = sum(p.numel() for name, p in self.net.named_parameters() if name not in parents)
        beside, others = self.passes.trained_copies, self.critic + self.tuned
        self.trained = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        self.weights = self.network + self.copied * beside + others
        self.trainable = self.trained * (1 + beside) + others
        self.saved = self.copied * (1 + beside) + others
        self.averaged = (self.saved if own else self.weights) * self.averages

    def _sized(self, place: str, part: Namespace, kind: type, **linked: Any) -> Any:
        built, _, notes = sized_or_assumed(place, part, kind, **linked)
        self.notes += notes
        return built

    def _passes(self, channels: int) -> StepPasses:
        model, trainer = self.settings.model, self.settings.trainer
        try:
            return step_passes(model, trainer.max_steps, self.settings.data.batch_size, channels)
        except Exception as error:  # an own class may ask for more than the stand-in has
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self.notes.append(
                f"model: its step cannot be taken with a stand-in for the network ({reason}); planned with one pass "
                "that trains: add the operations of all others"
            )
            return StepPasses(Passes(trained=1, backward=2, repeated=1, recorded=1))

    def parameters(self) -> list[str]:
        """Parameters by part."""
        parts: dict[str, list[int]] = {}
        for name, parameter in self.net.named_parameters():
            part = parts.setdefault(name.removeprefix("transformer.").removeprefix("model.").partition(".")[0], [0, 0])
            part[0] += parameter.numel()
            part[1] += parameter.numel() * parameter.requires_grad
        autoencoder = sum(p.numel() for p in self.autoencoder.parameters())
        lines = [
            "Parameters",
            row("network", f"{self.network:,}", f"{self.trained:,} train"),
            *(row(f"  {name}", f"{total:,}", f"{some:,} train") for name, (total, some) in parts.items()),
        ]
        if self.adapter is not None:
            share = f"{self.trained / self.network:.2%} of the network train, intervals' embedding among them"
            lines.append(row("adapters", f"rank {self.adapter.rank}", share))
        if beside := self.passes.trained_copies:
            lines.append(row("copies that train", f"{beside * self.copied:,}", f"{beside} of the network"))
        if frozen := self.passes.frozen_copies:
            lines.append(row("copies that do not", f"{frozen * self.copied:,}", f"{frozen} of the network"))
        if self.critic:
            lines.append(row("discriminator", f"{self.critic:,}", "all train"))
        lines.append(row("text encoder", f"{self.text.parameters:,}", "all train" if self.tuned else "frozen"))
        lines.append(row("autoencoder", f"{autoencoder:,}", "frozen"))
        return [*lines, row("started from", str(self.pretrained))] if self.pretrained else lines

    def memory(self) -> list[str]:
        """Memory of a device, by strategy."""
        trainer, batch = self.settings.trainer, self.settings.data.batch_size
        mixed = str(trainer.precision) in AUTOCAST
        activations = self.cost.block_activations if self.checkpointing else self.cost.activations
        activations = int(activations * batch * self.passes.network.recorded)
        copies = 4 * self.copied * self.passes.frozen_copies
        encoder = 0 if self.tuned else self.text.bytes  # encodes captions that the cache does not hold
        frozen = copies + encoder + sum(p.numel() * p.element_size() for p in self.autoencoder.parameters())
        average = 4 * self.averaged
        gradients = 4 * self.trainable
        states = 4 * self.weights + 3 * gradients  # weights, gradients and AdamW's two moments
        casts = 2 * self.weights * mixed
        passes = activations // 2 if mixed else activations
        block = max((4 * sum(p.numel() for p in b.parameters()) for b in self.net.blocks), default=4 * self.weights)
        ddp = states + gradients + average + casts + passes + frozen
        fsdp = (states + average) // self.devices + 2 * block + casts + passes + frozen
        room = DEVICES[self.device][1]
        is_sharded = isinstance(trainer.strategy, Namespace)
        chosen = "set to FSDP2" if is_sharded else "set to DDP" if self.devices > 1 else "one device"
        kept = "checkpointed" if self.checkpointing else "all; gradient_checkpointing keeps few"
        fits = {size: "fits" if size < 0.9e9 * room else "does not fit" for size in (ddp, fsdp)}
        return [
            f"Memory of each of {self.devices} devices, {batch} rows on each ({self.device}: {room} GB; {chosen})",
            row("weights, gradients, AdamW", gb(states), "fp32"),
            *([row("averages", gb(average), "fp32")] if average else []),
            row("frozen", gb(frozen), "encoder, autoencoder" + (", copies of the network" if copies else "")),
            row("activations", gb(passes), kept),
            *([row("weights cast to 16 bit", gb(casts), "autocast's, during a step")] if casts else []),
            row("in all, one device or DDP", gb(ddp), fits[ddp]),
            row("in all, FSDP2", "none", f"it shards one network, and {self.several} trains two")
            if self.several
            else row(f"in all, FSDP2 over {self.devices}", gb(fsdp), fits[fsdp]),
            row("", "", "counted, not measured: allow a tenth and more for the allocator"),
        ]

    def disk(self) -> list[str]:
        """Caches and checkpoints."""
        shapes = {"cache": (self.text.length, self.text.width), "latent_cache": self._latent_shape}
        lines = [f"Disk ({self.samples:,} samples)"]
        for name, (length, width) in shapes.items():
            if (cache := self._cache(name)) is None:
                lines.append(row(f"data.{name}", "none", "computed each time"))
                continue
            entry = EntryFormat(length, width, cache.dtype)
            needed = entry.on_disk() * self.samples
            limit = gigabytes(needed)
            room = "within max_gb" if limit <= cache.max_gb else f"--data.{name}.max_gb {limit:g} holds them"
            lines.append(row(f"data.{name}", gb(needed), f"{entry.largest / 1e6:.3g} MB each in {cache.dtype}; {room}"))
        saved = 4 * self.saved * (1 + self.averages) + 8 * self.trainable
        return [*lines, row("a checkpoint", gb(saved), "with the optimiser; two are kept")]

    @property
    def _latent_shape(self) -> tuple[int, int]:
        return self.autoencoder.channels, self.side**2

    def _cache(self, name: str) -> Any:
        cache = self.settings.data.get(name)
        return cache if cache is None else cache.get("init_args", cache)  # a class_path is optional here

    @property
    def rows(self) -> int:
        """Rows of a step, on all devices."""
        trainer = self.settings.trainer
        return int(self.settings.data.batch_size * self.devices * trainer.accumulate_grad_batches)

    @property
    def flops(self) -> float:
        """Operations of a row of training."""
        data, network, critic = self.settings.data, self.passes.network, self.passes.discriminator
        without = network.trained * (self.adapter is not None)  # gradients of frozen weights are not computed
        flops = self.cost.flops * (_operations(network) - without + self.checkpointing * network.repeated)
        flops += self.critic_flops * _operations(critic)
        text = 4 if self.tuned else not data.cache  # a pass for the features, three to train
        flops += text * sum(self.text.flops)
        return flops + (encoding_flops(self.autoencoder, data.resolution) if self._encodes_images else 0)

    @property
    def _encodes_images(self) -> bool:
        return bool(self.settings.data.images and not self.settings.data.latent_cache)

    @property
    def speed(self) -> float:
        """Operations that a device computes in a second."""
        return DEVICES[self.device][0] * 1e12 * self.utilisation

    def time(self) -> list[str]:
        """Steps, operations and duration."""
        trainer, data, network = self.settings.trainer, self.settings.data, self.passes.network
        steps, flops = max(trainer.max_steps, 0), self.flops
        images = steps * self.rows
        encodes = {"caption": any(self.text.flops) and not data.cache, "image": self._encodes_images}
        encoded = [name for name, does in encodes.items() if does]
        work = f"passes: {network.trained:.3g} train, {network.plain:.3g} do not"
        work += f", du/dt of {network.derivative:.0%} of the rows"
        work += f"; encoding the {' and the '.join(encoded)}" if encoded else "; caches hold the rest"
        seconds = flops * data.batch_size * trainer.accumulate_grad_batches / self.speed
        days = seconds * steps / 86400
        patch = getattr(getattr(self.net, "diffusers_model", None), "config", {}).get("patch_size") or 1
        positions = (self.side // patch) ** 2
        tokens = f"of latents, {positions:,} a row; of text {images * self.text.length:.3g}"
        speed = f"{self.device} at {self.speed / 1e12:.0f} TFLOP/s, {self.utilisation:.0%} of its peak"
        duration = f"{days * 24:.3g} h" if days < 2 else f"{days:.3g} days"
        return [
            "Training",
            row("steps", f"{steps:,}", f"of {self.rows:,} rows: {images / self.samples:.1f} passes"),
            row("tokens", f"{images * positions:.3g}", tokens),
            row("a row", f"{flops / 1e12:.3g} TFLOP", work),
            row("a step", f"{seconds:.3g} s", speed),
            row("in all", duration, f"{days * 24 * self.devices:,.1f} GPU hours"),
            row("", "", "without waiting for data, filling the cache, scores and saving"),
        ]

    def worth(self, prices: Prices) -> list[str]:
        """What to store of the text encoder's work, for this many samples and others."""
        whole, steps, cache = sum(self.text.flops), self.settings.trainer.max_steps, self._cache("cache")
        if self.tuned or not whole or steps < 1:
            return []
        stored = EntryFormat(self.text.length, self.text.width, "bfloat16" if cache is None else cache.dtype)
        share = whole / (self.flops - (0 if cache else whole))
        rows = steps * self.rows
        return worth(self.text, stored, share, rows, sorted({self.samples, *SCALES}), self.speed, prices)


def _operations(passes: Passes) -> float:
    """Operations of the passes, in forward passes."""
    return passes.trained + passes.plain + passes.derivative * _DERIVATIVE + passes.backward
