"""RetinaNet's attentional heads on a GPU, with all levels in one call of every layer.

Small maps do not fill a GPU, and a layer takes the host as long for a small map as for a large one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import LocalSelfAttention2d
from ..layers.joined import attend_levels, runs_on_levels
from ..layers.plain import is_plain_call
from ..ops import cuda, cuda_layer
from ..ops.cuda_kernels import MOST_LEVELS, Maps
from ..ops.levels import join, multiply_levels
from .attention_tower import AttentionTower
from .joined_norm import normalize_and_rectify
from .pointwise import is_product

if TYPE_CHECKING:
    from .retinanet import AttentionRetinaNetHead


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
    if not 1 < len(features) <= MOST_LEVELS or not cuda_layer.is_there(features[0].device):
        return None
    if not _takes(head, features):
        return None
    pixels, maps = join(features)
    logits, deltas = (
        _predict(prediction, _run_tower(tower, pixels, maps), maps)
        for tower, prediction in _subnets(head)
    )
    return logits, deltas


def _subnets(head: "AttentionRetinaNetHead") -> list[tuple[nn.Module, nn.Sequential]]:
    return [(head.cls_subnet, head.cls_score), (head.bbox_subnet, head.bbox_pred)]


def _takes(head: "AttentionRetinaNetHead", features: Sequence[Tensor]) -> bool:
    first = features[0]
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
    return (
        cuda.takes_maps(Maps(first.shape[0], tuple(tuple(x.shape[2:]) for x in features)))
        and all(runs_on_levels(layers[0], x) for x in features)
        and all(runs_on_levels(layer, first) for layer in layers)
    )


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
