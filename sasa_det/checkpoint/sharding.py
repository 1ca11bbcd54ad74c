"""Whole tensors and the shards that the processes of a run hold of them."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds a shard of the model's parameters."""
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(state: Any, keep: bool) -> Any:
    """Return a state with whole tensors, in CPU memory, in place of shards.

    Args:
        state: nested dicts, lists and tuples, the same in all processes, which must all ask for it.
        keep: whether this process wants the whole tensors; None stands for them otherwise.
    """
    if isinstance(state, DTensor):
        tensor = full_tensor(state)
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        result = copy.copy(state)  # with the attributes of a model's state dict
        for key, value in state.items():
            result[key] = full_state(value, keep)
        return result
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value, keep) for value in state)
    return state


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return this process' shard of a tensor if another one of its shape is sharded.

    Args:
        tensor: whole, the same in all processes.
        other: the tensor in whose place it is to be, or one of another shape.
    """
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    shard = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return shard.clone()  # which does not keep the whole tensor
