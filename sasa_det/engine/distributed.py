"""Distributed models: DDP, or FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.sharding import shard_like


def distribute(model: nn.Module, *, shard: bool = False, **options: Any) -> nn.Module:
    """Wrap or shard a model for distributed training, with the weights of the first process.

    Args:
        model: on the device of this process.
        shard: whether to shard the parameters, gradients and optimizer state (FSDP2), which takes
            less memory and more time, instead of keeping a copy in each process (DDP). Sharding
            replaces the parameters of the model.
        options: of DDP, as of detectron2's ``create_ddp_model``.

    Returns:
        nn.Module: the module that computes losses: ``model`` itself if it is sharded or there is
        one process, and a wrapper otherwise.
    """
    if comm.get_world_size() == 1:
        return model
    if shard:
        return _sharded(model)
    on_gpu = next(model.parameters()).is_cuda
    devices = [comm.get_local_rank()] if on_gpu else None
    options = {"broadcast_buffers": False, **options}
    return create_ddp_model(model, device_ids=devices, **options)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without the wrapper of :func:`distribute`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Do not exchange gradients in a block, for the parts of a batch.

    The gradients of a sharded model are exchanged nevertheless: storing whole gradients would take
    the memory that sharding saves.
    """
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        yield


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights in each process for a block, so that processes can run independently.

    Args:
        model: sharded or not. Gradients must not be computed in the block.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(True, recurse=False)


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Shard the whole tensors in an optimizer's state dict as its parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=False))  # the optimizer raises on a mismatch
    return {
        **state,
        "state": {
            index: {key: _shard_value(value, by_index.get(index)) for key, value in values.items()}
            for index, values in state["state"].items()
        },
    }


def _shard_value(value: Any, parameter: nn.Parameter | None) -> Any:
    return shard_like(value, parameter) if isinstance(value, torch.Tensor) else value


def _sharded(model: nn.Module) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), src=0)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    for part in (*_parts(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    # Files hold whole weights.
    model.register_load_state_dict_pre_hook(_shard_weights)
    return model


def _parts(model: nn.Module) -> list[nn.Module]:
    """List the parts of a detector whose weights are together at one time, inner ones first.

    These are the stages of the backbone, the rest of the backbone with the FPN, and the heads. All
    other parameters form one more part.
    """
    backbone = getattr(model, "backbone", None)
    stages = getattr(backbone, "bottom_up", backbone)
    stages = [] if stages is None else stages.children()
    heads = ("head", "proposal_generator", "roi_heads", "sem_seg_head")
    parts = [
        *(stage for stage in stages if isinstance(stage, nn.Sequential)),
        backbone,
        *(dict(model.named_children()).get(name) for name in heads),
    ]
    return [part for part in parts if part is not None]


def _shard_weights(model: nn.Module, weights: dict[str, Any], *_: Any) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            weights[name] = shard_like(weights[name], parameter)
