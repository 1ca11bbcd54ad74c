"""Fusing a model for inference: batch norms become part of the weights before them."""

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
from detectron2.layers import Conv2d, CycleBatchNormList, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import LocalSelfAttention2d
from ..layers.plain import is_plain_call, is_plain_pointwise
from .backbone.sasa_resnet import AttentionBottleneckBlock
from .fused import tower as run_tower
from .level_norm import LevelBatchNorm
from .pointwise import NormedPointwiseConv2d, PointwiseConv2d
from .retinanet import AttentionRetinaNetHead, AttentionTower

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference whose batch norms are part of the weights.

    The norm after a convolution scales its weights. The norm after attention scales the value
    projection, in which the output of attention is linear; its shift is the bias of the projection,
    because the attention weights of a pixel sum to 1 (except with border "zero", with which the
    norm is kept). A norm of several levels, in RetinaNet's head, makes weights of its own for each
    level. Batch norms of queries and keys (``MODEL.SASA.QK_NORM``) scale their projections, but in
    RetinaNet's head they are kept. Layers with hooks and subclasses of the known layers are left as
    they are. An ``nn.Sequential`` is taken to be called as a whole.

    Args:
        model: a detector, a classifier or a backbone, of this project or of detectron2, which is
            not changed.

    Returns:
        nn.Module: in eval mode and without gradients. Results differ by rounding alone. The names
        in its state dict differ from the model's, so that neither loads the weights of the other.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        # First, since the folded copies of attention layers have no other parents.
        for module in list(fused.modules()):
            if type(module) is LocalSelfAttention2d:
                _fold_logit_norms(module)
        for module in list(fused.modules()):
            _fuse_norms(module)
    return fused


def _fold_logit_norms(attention: LocalSelfAttention2d) -> None:
    """Remove the norms of queries and keys, where that is possible."""
    for name in ("query", "key"):
        projection, norm = getattr(attention, name), getattr(attention, f"{name}_norm")
        if norm is not None and is_plain_pointwise(projection) and _are_plain(projection, norm):
            setattr(attention, name, fuse_conv_bn_eval(projection, norm))
            setattr(attention, f"{name}_norm", None)


def _fuse_norms(module: nn.Module) -> None:
    """Remove the norms that are children of a module, where that is possible."""
    kind = type(module)
    if kind in (Conv2d, NormedPointwiseConv2d) and _are_plain(module, module.norm):
        folded = fuse_conv_bn_eval(module, module.norm)
        module.weight, module.bias, module.norm = folded.weight, folded.bias, None
    elif kind is AttentionBottleneckBlock:
        if _can_fold(module.attention, module.norm):
            module.attention = _folded(module.attention, module.norm)
            module.norm = nn.Identity()
    elif kind is AttentionRetinaNetHead:
        for name in ("cls_subnet", "bbox_subnet"):
            tower = module._modules[name]
            if type(tower) is AttentionTower and _can_fold_tower(tower):
                module._modules[name] = _FusedTower(tower)
    elif kind is nn.Sequential:
        for first, second in pairwise(list(module._modules)):
            fused = _fused_pair(module._modules[first], module._modules[second])
            if fused is not None:
                module._modules[first], module._modules[second] = fused, nn.Identity()


def _fused_pair(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """Return what a layer and the norm behind it do together; None if that is not known."""
    if _can_fold(layer, norm):
        return _folded(layer, norm)
    if type(layer) not in (nn.Conv2d, PointwiseConv2d) or not is_plain_call(layer):
        return None
    if _are_plain(layer, norm):
        return fuse_conv_bn_eval(layer, norm)
    if type(norm) in (CycleBatchNormList, LevelBatchNorm) and is_plain_call(norm):
        layers = [fuse_conv_bn_eval(layer, _with_affine(part, norm)) for part in norm]
        return _Cycle(layers, norm._pos)
    return None


def _are_plain(layer: nn.Module, norm: nn.Module | None) -> bool:
    known = type(norm) in _BATCH_NORMS and norm.running_mean is not None
    return known and is_plain_call(norm) and is_plain_call(layer)


def _can_fold(attention: nn.Module, norm: nn.Module | None) -> bool:
    return (
        type(attention) is LocalSelfAttention2d
        and attention.border == "mask"
        and is_plain_pointwise(attention.value)
        and _are_plain(attention, norm)
    )


def _can_fold_tower(tower: AttentionTower) -> bool:
    return is_plain_call(tower) and all(
        "norms" in layer and all(_can_fold(layer["attention"], norm) for norm in layer["norms"])
        for layer in tower
    )


def _folded(attention: LocalSelfAttention2d, norm: nn.Module) -> LocalSelfAttention2d:
    """Return attention followed by a norm, which shares all but its value projection."""
    folded = copy.copy(attention)
    for name, value in vars(attention).items():
        if isinstance(value, dict):  # of modules and hooks
            vars(folded)[name] = value.copy()
    folded.value = fuse_conv_bn_eval(attention.value, norm)
    return folded


def _with_affine(norm: nn.BatchNorm2d, norms: CycleBatchNormList) -> nn.BatchNorm2d:
    """Return one of the norms that share their scale and shift as a norm that has its own."""
    if norms._affine:
        norm.weight, norm.bias = norms.weight, norms.bias
    return norm


class _FusedTower(nn.ModuleList):
    """The layers of an :class:`AttentionTower`, with weights of their own for each level."""

    def __init__(self, tower: AttentionTower):
        super().__init__(
            nn.ModuleList(_folded(layer["attention"], norm) for norm in layer["norms"])
            for layer in tower
        )

    def forward(self, x: Tensor, level: int) -> Tensor:
        attentions = [layers[level % len(layers)] for layers in self]
        fused = run_tower(x, attentions, [None] * len(attentions))
        if fused is not None:
            return fused
        for attention in attentions:
            x = torch.relu(attention(x))
        return x


class _Cycle(nn.ModuleList):
    """The layers of the levels, which are called in turn as detectron2's CycleBatchNormList is."""

    def __init__(self, layers: Iterable[nn.Module], position: int):
        super().__init__(layers)
        self._position = position

    def forward(self, x: Tensor) -> Tensor:
        layer = self[self._position]
        self._position = (self._position + 1) % len(self)
        return layer(x)
