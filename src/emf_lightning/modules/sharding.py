"""Networks whose weights are sharded over ranks (FSDP2), and gathered where one rank needs all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from emf_lightning.import_policy import known_classes_only
from emf_lightning.networks.base import FlowMapNetwork
from emf_lightning.networks.frozen import copied

LIVE = "current_model_state."
"""In a sharded checkpoint, the names of the live weights where the plain names are the averages'."""


def is_sharded(module: nn.Module) -> bool:
    """Whether weights are sharded over ranks (FSDP2), which makes forward passes and reading weights collective."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh's data-parallel dimension.

    Raises:
        ValueError: for a tensor-parallel dimension, which Lightning's default sizes make on one node: its ranks would
            train on different data, each by itself.
    """
    tensor = mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"ModelParallelStrategy: tensor_parallel_size is {tensor}, but these networks shard over data_parallel "
            f"only; its sizes left at auto do that: set data_parallel_size: {mesh.size()}, tensor_parallel_size: 1"
        )
    return mesh["data_parallel"]


def shard(net: FlowMapNetwork, mesh: DeviceMesh) -> FlowMapNetwork:
    """Shards ``net`` over the ranks of a 1-D ``mesh``, in place, each block a unit and the rest another.

    All ranks start from the weights of rank 0, as in DDP. Weights, gradients and communication keep the weights'
    precision, and bf16 gradients are summed in fp32; autocast alone lowers the precision. Inputs are never cast: at the
    root they hold t and r, and rounding these to bf16 put du/dt off by 113 % in a measurement.

    Returns:
        A copy of the network before sharding, without storage for its parameters (on the meta device).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    template = _without_storage(net)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*net.blocks, net):
        part.to(mesh.device_type)  # here rather than in fully_shard: NCCL sends nothing from the CPU
        for tensor in (*part.parameters(), *part.buffers()):
            if not isinstance(tensor, DTensor):  # a block's, once its turn was
                dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=0)
        # The root reshards, too: by default its weights stay gathered after a pass without gradients, and averaging
        # and checkpoints would read those instead of the shards.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return template


def _without_storage(net: FlowMapNetwork) -> FlowMapNetwork:
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo=parameters)


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors of a state dict on the CPU, on rank 0; empty on the others. Every rank must call it."""
    whole = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            whole[name] = full.detach().cpu()
    return whole


def scattered(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of full tensors that every rank holds, laid out as those of ``like``."""
    return {name: _scattered(tensor, like[name]) for name, tensor in state.items()}


def _scattered(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_network(net: FlowMapNetwork, template: FlowMapNetwork | None) -> FlowMapNetwork | None:
    """A plain copy of ``net`` with all its weights, on rank 0; None on the others. Every rank must call it.

    Args:
        net: the network, sharded or not.
        template: the return value of ``shard``, None where the network is not sharded.
    """
    if template is None:
        return copied(net) if not dist.is_initialized() or dist.get_rank() == 0 else None
    state = gathered(net.state_dict())
    if not state:
        return None
    whole = copy.deepcopy(template)
    whole.load_state_dict(state, assign=True)
    return whole


class ShardableModule(LightningModule):
    """A LightningModule whose network ``ModelParallelStrategy`` shards.

    Attributes:
        net: the network.
        gather_once: gather sharded weights once a step instead of once a pass.
    """

    net: FlowMapNetwork
    gather_once = False
    _template: tuple[FlowMapNetwork] | None = None  # a tuple, so that it is no part of the module

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Lightning's, which builds the module from the file's hyperparameters: of known classes only, without pickles.

        ``trusting(True)`` around the call lets the file name any class.
        """
        with known_classes_only():
            return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **options})

    def configure_model(self) -> None:
        """Shards the network where the strategy is ``ModelParallelStrategy``."""
        if self.device_mesh is None or is_sharded(self.net):
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        for callback in self.trainer.callbacks if fitting else ():  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and not getattr(callback, "averages_shards", False):
                raise ValueError(
                    f"{type(callback).__name__} copies the whole module, which a sharded one does not allow: name "
                    "WeightEMA in trainer.callbacks instead, with the same arguments"
                )
        self._template = (shard(self.net, data_parallel(self.device_mesh)),)
        if self.net.parent_weights:
            self.strict_loading = False  # a checkpoint in one file leaves these out

    def full_network(self) -> FlowMapNetwork | None:
        """A plain copy of the network with all its weights, on rank 0; None on the others. Every rank must call it."""
        return full_network(self.net, self._template[0] if self._template else None)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which sharded weights are gathered once, where ``gather_once`` asks for it."""
        if not (self.gather_once and is_sharded(self.net)):
            yield
            return
        assert isinstance(self.net, FSDPModule)
        self.net.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self.net.set_reshard_after_forward(True)  # the backward pass shards each block again in any case
