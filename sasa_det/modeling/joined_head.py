"""RetinaNet's attentional heads on a GPU, with all levels in one call of every layer.

Small maps do not fill a GPU, and a layer takes the host as long for a small map as for a large one.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..layers import LocalSelfAttention2d
from ..layers.joined import attend_levels, product_dtype, runs_on_levels
from ..layers.plain import is_plain_call
from ..ops import cuda, cuda_layer
from ..ops.cuda_kernels import MOST_LEVELS, Maps
from ..ops.levels import join, maps_of, multiply_levels
from .attention_tower import AttentionTower
from .joined_norm import are_one_call, group_of, normalize_and_rectify
from .pointwise import is_product

if TYPE_CHECKING:
    from .retinanet import AttentionRetinaNetHead

logger = logging.getLogger(__name__)


def run_joined(
    head: "AttentionRetinaNetHead", features: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Run the heads on all levels at once.

    Args:
        head: any of that class.
        features: one (N, C, H, W) for each level.

    Returns:
        (logits, deltas) as the head returns them, in the layout channels_last; None where the CUDA
        kernels do not take all layers, or modules are more than their weights, as with hooks.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    device, group = features[0].device, _group_of(head)
    takes = _takes(head, features, norms_exchange=group is not None)
    if group is not None and device.type == "cuda":
        takes = agreed(head, takes, group, device)
    if not takes:
        return None
    pixels, maps = join(features)
    logits, deltas = (
        _predict(prediction, _run_tower(tower, pixels, maps), maps)
        for tower, prediction in _subnets(head)
    )
    return logits, deltas


def _subnets(head: "AttentionRetinaNetHead") -> list[tuple[nn.Module, nn.Sequential]]:
    return [(head.cls_subnet, head.cls_score), (head.bbox_subnet, head.bbox_pred)]


def _takes(
    head: "AttentionRetinaNetHead", features: Sequence[Tensor], norms_exchange: bool
) -> bool:
    first = features[0]
    if not 1 < len(features) <= MOST_LEVELS or not cuda_layer.is_there(first.device):
        return False
    if any(_kind_of(x) != _kind_of(first) for x in features):
        return False
    layers, called = [], []
    for tower, prediction in _subnets(head):
        if type(tower) is not AttentionTower:  # fused, with weights for each level
            return False
        called += [tower, prediction]
        layers += [layer["attention"] for layer in tower] + [prediction[0]]
        if not all(map(is_product, prediction[1:])):
            return False
    if not all(type(x) is LocalSelfAttention2d and is_plain_call(x) for x in layers):
        return False
    if not all(map(is_plain_call, called)):
        return False
    # Layers differ in their weights, and not in what maps they take.
    maps = maps_of(features)
    return (
        cuda.takes_maps(maps, layers[0].num_heads)
        and all(runs_on_levels(layers[0], x) for x in features)
        and all(runs_on_levels(layer, first) for layer in layers)
        and (not norms_exchange or _takes_norms(head, first, maps))
    )


def _takes_norms(head: "AttentionRetinaNetHead", first: Tensor, maps: Maps) -> bool:
    dtype = product_dtype(first)
    for layer in (layer for tower, _ in _subnets(head) for layer in tower):
        # Like the matrix that the norms will take, without its memory.
        place = torch.empty((), dtype=dtype, device=first.device)
        pixels = place.expand(sum(maps.pixels), layer["attention"].out_channels)
        if not are_one_call(pixels, layer["norms"], maps):
            return False
    return True


def _group_of(head: "AttentionRetinaNetHead") -> ProcessGroup | None:
    """Return the processes with which the norms of a head exchange sums, or None."""
    norms = (norm for tower, _ in _subnets(head) for layer in tower for norm in _norms_of(layer))
    return next((group for group in map(group_of, norms) if group is not None), None)


def _norms_of(layer: nn.Module) -> Sequence[nn.Module]:
    return layer["norms"] if isinstance(layer, nn.ModuleDict) and "norms" in layer else ()


_agreements: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def agreed(head: nn.Module, takes: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Return whether the kernels take a head in all processes; it is asked at the first call.

    Norms of all levels exchange their sums at once, and those of one level after the other five
    times: if processes differed in it, they would wait for each other, or mix up what they get.

    Args:
        head: of this process.
        takes: whether they take it here.
        group: of the norms.
        device: of the head.

    Raises:
        RuntimeError: if they took it in all processes once, and do not here any more.
    """
    if head not in _agreements:
        flag = torch.tensor([int(takes)], device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
        _agreements[head] = bool(flag.item())
        if takes and not _agreements[head]:
            logger.info("RetinaNet's heads run level by level: another process cannot join them.")
    if _agreements[head] and not takes:
        raise RuntimeError(
            "RetinaNet's heads run all levels at once in the other processes, and cannot any more "
            "in this one: hooks and counters of operators must be the same in all processes."
        )
    return _agreements[head]


def _kind_of(x: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return x.dtype, x.device, x.shape[:2]


def _run_tower(tower: AttentionTower, pixels: Tensor, maps: Maps) -> Tensor:
    for layer in tower:
        pixels = attend_levels(layer["attention"], pixels, maps)
        if "norms" in layer:
            pixels = normalize_and_rectify(pixels, layer["norms"], maps)
        else:
            pixels = torch.relu(pixels)
    return pixels


def _predict(prediction: nn.Sequential, pixels: Tensor, maps: Maps) -> list[Tensor]:
    attention, *mixing, last = prediction
    pixels = attend_levels(attention, pixels, maps)
    for layer in mixing:
        bias = None if layer.bias is None else layer.bias.to(pixels.dtype)
        pixels = F.linear(pixels, layer.weight.flatten(1).to(pixels.dtype), bias)
    return multiply_levels(pixels, last.weight, last.bias, maps)
