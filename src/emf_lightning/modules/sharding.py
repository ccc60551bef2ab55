"""A network whose weights are spread over ranks (FSDP2), and whole again where one rank needs all of it."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from emf_lightning.networks.base import FlowMapNetwork

LIVE = "current_model_state."
"""In a sharded checkpoint, the names of the live weights where the plain names are the averages'."""


def is_sharded(module: nn.Module) -> bool:
    """Whether weights are spread over ranks (FSDP2): then forward passes are collective, and so is reading weights."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh's data-parallel dimension.

    Raises:
        ValueError: where ranks are left for tensor parallelism, as Lightning's default sizes do on one node: these
            ranks would train on different data and each believe itself alone.
    """
    tensor = mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"ModelParallelStrategy: tensor_parallel_size is {tensor}, but these networks shard over data_parallel "
            f"only; its sizes left at auto do that: set data_parallel_size: {mesh.size()}, tensor_parallel_size: 1"
        )
    return mesh["data_parallel"]


def shard(net: FlowMapNetwork, mesh: DeviceMesh) -> FlowMapNetwork:
    """Spreads ``net`` over the ranks of a 1-D ``mesh``, in place, each block a unit and the rest another.

    Rank 0's weights count, as in DDP. Weights, gradients and what is communicated keep the weights' precision, bf16
    gradients are summed in fp32; lower precision is autocast's, as everywhere else. Inputs are never cast: at the root
    they hold t and r, whose rounding to bf16 was measured to put du/dt off by 113 %.

    Returns:
        A copy of the network as it was, without storage for its parameters (on the meta device).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    template = _without_storage(net)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*net.blocks, net):
        part.to(mesh.device_type)  # here rather than in fully_shard: NCCL sends nothing from the CPU
        for tensor in (*part.parameters(), *part.buffers()):
            if not isinstance(tensor, DTensor):  # a block's, once its turn was
                dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=0)
        # said for the root, too: by default its weights stay whole after a pass without gradients, and whoever then
        # asks for the parameters (averaging, checkpoints) would get those instead of the shards
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return template


def _without_storage(net: FlowMapNetwork) -> FlowMapNetwork:
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo=parameters)


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's tensors whole and on the CPU, on rank 0; empty on the others. Every rank must call it."""
    whole = {}
    for name, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            whole[name] = full.detach().cpu()
    return whole


def scattered(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of whole tensors that every rank holds, laid out as those of ``like`` are."""
    return {name: _scattered(tensor, like[name]) for name, tensor in state.items()}


def _scattered(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_network(net: FlowMapNetwork, template: FlowMapNetwork | None) -> FlowMapNetwork | None:
    """A plain copy of ``net`` with all its weights, on rank 0; None on the others. Every rank must call it.

    Args:
        net: the network, sharded or not.
        template: what ``shard`` returned, None where the network is not sharded.
    """
    if template is None:
        return copy.deepcopy(net) if not dist.is_initialized() or dist.get_rank() == 0 else None
    state = gathered(net.state_dict())
    if not state:
        return None
    whole = copy.deepcopy(template)
    whole.load_state_dict(state, assign=True)
    return whole
