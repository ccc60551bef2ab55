"""The passes of a training step, counted by taking the step itself, with stand-ins for the networks."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn
from torch.autograd import forward_ad

from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.cli.shipped import with_shipped_files
from emf_lightning.data.batch import CaptionImageBatch
from emf_lightning.import_policy import known_classes_only
from emf_lightning.modules.alternating import AlternatingModule
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.discriminator import Discriminator
from emf_lightning.networks.prediction import PredictVelocity
from emf_lightning.part_classes import takes
from emf_lightning.text.base import TextFeatures

_PLACES = 6
"""Places in training at which steps are taken: schedules move between them."""

_CYCLE = 12
"""Steps at each place where two networks train: their objectives take 1, 2, ... jumps in turn."""

_LEFT_OUT = {"net", "discriminator", "init_from", "optimization"}


@dataclass
class _Pass:
    """A forward pass: its rows, whether it carries a tangent or a graph, and how often gradients came through."""

    rows: int
    tangent: bool
    recorded: bool
    to_weights: int = 0
    to_inputs: int = 0

    @property
    def backward(self) -> int:
        """Operations of the backward passes, in forward passes: one for inputs, one for weights.

        A gradient with respect to the inputs that is differentiated once more (R1) costs two more.
        """
        if not self.to_weights:
            return self.to_inputs
        return 2 * self.to_weights + 3 * max(self.to_inputs - self.to_weights, 0)


@dataclass(eq=False)
class _Log:
    """Passes of all stand-ins of a kind in the present update; copies of a stand-in share it."""

    passes: list[_Pass] = field(default_factory=list)
    networks: Any = field(default_factory=weakref.WeakSet)

    def __deepcopy__(self, memo: Any) -> _Log:
        return self


class _Counted(nn.Module):
    """A stand-in with one weight, whose passes are logged."""

    log: _Log

    def _watch(self, log: _Log) -> None:
        self.log = log
        self.weight = nn.Parameter(torch.ones(()))
        log.networks.add(self)

    def __setstate__(self, state: Any) -> None:  # of a copy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.log.networks.add(self)

    def _through(self, z: Tensor) -> Tensor:
        x, weight = z * 1, self.weight * 1
        recorded = torch.is_grad_enabled() and (self.weight.requires_grad or z.requires_grad)
        one = _Pass(len(z), forward_ad.unpack_dual(z).tangent is not None, recorded)  # type: ignore[no-untyped-call]
        self.log.passes.append(one)
        for tensor, name in ((weight, "to_weights"), (x, "to_inputs")):
            if recorded and tensor.requires_grad and not one.tangent:
                tensor.register_hook(lambda _, name=name: setattr(one, name, getattr(one, name) + 1))  # type: ignore[no-untyped-call]
        if one.tangent and self.weight.requires_grad and recorded:  # tensors inside torch.func take no hooks
            self.weight.register_hook(lambda _: setattr(one, "to_weights", 1))  # type: ignore[no-untyped-call]
        return x * weight


class _Network(_Counted, FlowMapNetwork):
    prediction = PredictVelocity()
    takes_guidance = takes_negative_times = True

    def __init__(self, log: _Log, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.latent_channels, self.latent_size, self.context_width = channels, side, width
        self._watch(log)

    def backbone(self, z: Tensor, *_: Any) -> Tensor:
        return z

    def forward(self, z: Tensor, *_: Any, **__: Any) -> Tensor:
        u = self._through(z)
        return torch.cat([u, u], dim=1)  # a head for v, too, which is cut off where none is asked for


class _Critic(_Counted, Discriminator):
    def __init__(self, log: _Log) -> None:
        super().__init__()
        self._watch(log)

    def forward(self, z: Tensor, *_: Any) -> Tensor:
        return self._through(z).flatten(1).mean(1)


@dataclass
class Passes:
    """Passes of a network, or of a discriminator, in the mean training step; 1 is a pass of all rows of a batch.

    Attributes:
        trained: passes whose gradient reaches weights.
        plain: all others, except:
        derivative: passes that carry du/dt.
        backward: operations of all backward passes, in forward passes.
        repeated: passes that gradient checkpointing would compute again.
        recorded: the most that are kept for one backward pass.
    """

    trained: float = 0.0
    plain: float = 0.0
    derivative: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0
    recorded: float = 0.0

    def add(self, passes: list[_Pass], rows: float) -> None:
        """Counts one update's passes, and forgets them; ``rows`` are all steps', but for ``recorded``."""
        for one in passes:
            share = one.rows / rows
            self.derivative += share * one.tangent
            self.trained += share * (one.to_weights > 0 and not one.tangent)
            self.plain += share * (not one.to_weights and not one.tangent)
            self.backward += share * one.backward
            self.repeated += share * (one.to_weights + one.to_inputs > 0)
        passes.clear()


@dataclass
class StepPasses:
    """What a training step asks of the network and the discriminator.

    Attributes:
        network: passes of the network and of all its copies.
        discriminator: passes of the discriminator.
        trained_copies: copies of the network that train beside it.
        frozen_copies: copies that do not.
    """

    network: Passes = field(default_factory=Passes)
    discriminator: Passes = field(default_factory=Passes)
    trained_copies: int = 0
    frozen_copies: int = 0


def step_passes(model: Namespace, max_steps: int, batch_size: int, channels: int) -> StepPasses:
    """Passes of the mean training step of the ``model`` of a configuration.

    The module and its objective are the real ones, so the count is right for own classes as well.
    """
    of_network, of_critic, found = _Log(), _Log(), StepPasses()
    # small batches have samples of each kind by chance: what counts is their mean
    side, width, batch_size = 4, 8, min(batch_size, 64) if batch_size >= 8 else 64
    module = _module(model, _Network(of_network, channels, side, width), of_critic)
    module._planned_steps = max(max_steps, 1)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    if module.tunes_encoder:
        module.drop_captions = lambda batch: FlowMapModule.drop_captions(module, batch)  # type: ignore[method-assign]
    text = TextFeatures(torch.zeros(batch_size, 2, width), torch.ones(batch_size, 2, dtype=torch.bool))
    batch = CaptionImageBatch(torch.zeros(batch_size, channels, side, side), text, text[:1], ("",) * batch_size)
    places = [(2 * place + 1) * module._planned_steps // (2 * _PLACES) for place in range(_PLACES)]
    cycle = _CYCLE if isinstance(module, AlternatingModule) else 1
    steps = [place + k for place in places for k in range(cycle)]
    rows, logs = len(steps) * batch_size, ((found.network, of_network), (found.discriminator, of_critic))
    for step in steps:
        module.trainer = SimpleNamespace(global_step=min(step, module._planned_steps - 1))  # type: ignore[assignment]
        for loss_of, parts, times in _updates(module):
            for piece in batch.parts(parts):
                loss = loss_of(piece)
                for passes, log in logs:
                    recorded = sum(one.rows for one in log.passes if one.recorded) / batch_size
                    passes.recorded = max(passes.recorded, recorded)
                loss.backward()
                for passes, log in logs:
                    passes.add(log.passes, rows / times)
    trained = {id(part) for part in module.modules() if isinstance(part, _Network)}
    found.trained_copies = len(trained) - 1
    found.frozen_copies = len(of_network.networks) - len(trained)
    return found


def _updates(module: FlowMapModule) -> Any:
    """(loss, parts of the batch, how often) of each update of a step, while only its own network can train."""
    if not isinstance(module, AlternatingModule):
        yield module.compute_loss, 1, 1
        return
    parts = module.alternation.micro_batches
    for network, other, loss, times in (
        (module.auxiliary, module.net, module.compute_auxiliary_loss, module.auxiliary_updates),
        (module.net, module.auxiliary, module.compute_loss, 1),
    ):
        other.requires_grad_(False)
        network.requires_grad_(True)
        if times:
            yield loss, parts, times


def _module(model: Namespace, net: _Network, of_critic: _Log) -> FlowMapModule:
    kind: Any = class_of(model.class_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "part", skip={name for name in _LEFT_OUT if takes(kind, name)})
    given = {key: value for key, value in model.init_args.as_dict().items() if key not in _LEFT_OUT}
    with known_classes_only():
        settings = parser.parse_object({"part": with_shipped_files(given)})
        arguments = dict(vars(parser.instantiate_classes(settings, instantiate_groups=False).part))
    if model.init_args.get("discriminator"):
        arguments["discriminator"] = lambda _: _Critic(of_critic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a module that holds its hyperparameters
        module: FlowMapModule = kind(net, **arguments)
    return module
