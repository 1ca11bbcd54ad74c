"""Where pixels look: the weights of a model's attention layers on an image."""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn

from ..errors import UsageError, nearest
from ..layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from ..ops import attention_weights, block_attention_weights
from ..utils.text import abbreviated_list

# Where a module of a model stands, and what people call it.
_NAMES = (
    (r"^backbone\.(bottom_up\.)?", ""),
    (r"^fpn_(lateral|output)(?=\d)", r"fpn.\1"),
    (r"^top_block\.", "fpn."),
    (r"^head\.(cls|bbox)_subnet\.", r"head.\1."),
    (r"^head\.(cls_score|bbox_pred)\.0$", r"head.\1"),
    (r"\.attention$", ""),
)

_SHARED = "head."

# Rows of blocks of the stem whose weights are computed at once, to save memory.
_BLOCK_ROWS = 32

_SHOWN = 12

_SAN = (
    "the attention of a SAN backbone cannot be shown: its weights differ by channel, and only "
    "those of local self-attention and of the attention stem are one for each head."
)


@dataclass(frozen=True)
class AttentionMaps:
    """The weights of an attention layer on an image.

    A window has a place for each row and column offset from -(k // 2) to k // 2. The weights of a
    head sum to 1 over it.

    Attributes:
        layer: name of the layer, with its level in a head that serves several.
        weights: (num_heads, k, k) float64, of the window of the pixel that was asked for.
        mean: (num_heads, k, k) float64, the mean over all pixels of the layer's map whose place is
            in the image and not in its padding.
        pixel: (row, column) of the pixel in the layer's map.
        map_size: (height, width) of the layer's map.
        cell: (height, width) of a pixel of the map, in pixels of the image.
        mixing: (num_mixtures, b, b) float64, of an attention stem with mixed values: the weights
            p(a, b, m) of its value matrices at the places of a block; None for other layers.
        is_block: whether a pixel attends to its own block alone, as in the stem; a window then
            reaches over all offsets between two pixels of a block.
    """

    layer: str
    weights: Tensor
    mean: Tensor
    pixel: tuple[int, int]
    map_size: tuple[int, int]
    cell: tuple[float, float]
    mixing: Tensor | None = None
    is_block: bool = False

    @property
    def num_heads(self) -> int:
        return self.weights.shape[0]

    @property
    def kernel_size(self) -> int:
        return self.weights.shape[-1]


class AttentionLayer(NamedTuple):
    """An attention layer of a model.

    Attributes:
        name: as users say it, such as "res4.2" or "head.cls.0@p3".
        module: the layer.
        call: which of the calls of the module in a forward pass is meant.
    """

    name: str
    module: LocalSelfAttention2d | AttentionStem
    call: int


def attention_layers(model: nn.Module) -> list[str]:
    """Name the attention layers of a model, those of a shared head once for each level.

    Args:
        model: a detector, a classifier or a backbone of this project, or an R-CNN with one of its
            backbones.

    Returns:
        list[str]: such as "stem", "res2.0", "fpn.output3", "fpn.p6", "head.cls.0@p3" and
        "head.cls_score@p3", in the order of the model's modules. A layer in a place that has no
        such name is called by its path in the model.
    """
    levels = _levels(model)
    return [
        name if level is None else f"{name}@{level}"
        for name in _attention_modules(model)
        for level in (levels if levels and name.startswith(_SHARED) else [None])
    ]


def require_attention_layers(model: nn.Module) -> list[str]:
    """Return the names of :func:`attention_layers`, of which there must be some.

    Raises:
        UsageError: if the model has none.
    """
    known = attention_layers(model)
    if not known:
        no_layers = "the model has no attention layers."
        raise UsageError(_SAN if _has_vector_attention(model) else no_layers)
    return known


def find_attention_layer(model: nn.Module, name: str) -> AttentionLayer:
    """Find an attention layer by its name.

    Args:
        model: as of :func:`attention_layers`.
        name: as :func:`attention_layers` gives it.

    Raises:
        UsageError: if there is no such layer, naming the nearest; if it has no attention; or if it
            serves several levels and none is named.
    """
    base, _, level = name.partition("@")
    modules, levels = _attention_modules(model), _levels(model)
    known = require_attention_layers(model)
    if base not in modules:
        raise UsageError(_unknown_layer(model, name, known))
    if not (levels and base.startswith(_SHARED)):
        if level:
            raise UsageError(f"layer {base} serves no levels, so leave @{level} out of {name}.")
        return AttentionLayer(name, modules[base], 0)
    if not level:
        raise UsageError(
            f"layer {base} serves the levels {', '.join(levels)}: name one of them, as in "
            f"{base}@{levels[0]}."
        )
    if level not in levels:
        raise UsageError(
            f"layer {base} serves the levels {', '.join(levels)}, not {level}{nearest(name, known)}"
        )
    return AttentionLayer(name, modules[base], levels.index(level))


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    image: Tensor | Mapping[str, Any],
    layer: str,
    at: tuple[float, float],
) -> AttentionMaps:
    """Compute where a pixel looks in an attention layer, and where all pixels look on average.

    These are the softmax weights of equation 3, in float64 from the queries and keys that the model
    computes; it runs in eval mode.

    Args:
        model: as of :func:`attention_layers`.
        image: (C, H, W), as the model takes it, or the dict of a mapper with it as "image". With
            "height" and "width" in the dict, ``at`` is in pixels of an image of this size.
        layer: as :func:`attention_layers` gives it.
        at: (X, Y) of a point of the image in pixels, from its left and upper border.

    Raises:
        UsageError: as :func:`find_attention_layer`, or if the point is outside the image.
    """
    found = find_attention_layer(model, layer)
    inputs = {"image": image} if isinstance(image, Tensor) else dict(image)
    size = tuple(inputs["image"].shape[-2:])
    full = inputs.get("height", size[0]), inputs.get("width", size[1])
    (x, y), (height, width) = at, full
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(
            f"the point {x:g} {y:g} is outside the image: X must be at least 0 and below {width}, "
            f"Y at least 0 and below {height}."
        )
    features, padded = _run(model, inputs, found)
    map_size = tuple(features.shape[-2:])
    stride = _stride(padded, map_size)
    pixel = tuple(
        min(int(place * inner / outer / stride), extent - 1)
        for place, inner, outer, extent in zip((y, x), size, full, map_size, strict=True)
    )
    inside = [
        min(math.ceil(inner / stride), extent) for inner, extent in zip(size, map_size, strict=True)
    ]
    total: Tensor | float = 0.0
    window = None
    for top, weights in _weights(_as_called(found), features):
        # (num_heads, k, k, rows, columns)
        rows = weights.shape[-2]
        total = total + weights[..., : max(inside[0] - top, 0), : inside[1]].sum((-2, -1))
        if top <= pixel[0] < top + rows:
            window = weights[..., pixel[0] - top, pixel[1]]
    is_stem = isinstance(found.module, AttentionStem)
    has_mixing = is_stem and found.module.values == "mixture"
    return AttentionMaps(
        layer=layer,
        weights=window.cpu().clone(),
        mean=(total / (inside[0] * inside[1])).cpu(),
        pixel=pixel,
        map_size=map_size,
        cell=tuple(stride * outer / inner for inner, outer in zip(size, full, strict=True)),
        mixing=found.module.mixing().double().cpu() if has_mixing else None,
        is_block=is_stem,
    )


def _as_called(layer: AttentionLayer) -> LocalSelfAttention2d | AttentionStem:
    """Return a layer in eval mode, whose norms of levels, if any, are about to see its level."""
    module = copy.deepcopy(layer.module).eval()
    for norm in module.modules():
        if isinstance(norm, CycleBatchNormList):
            norm._pos = layer.call % len(norm)
    return module


def _weights(
    module: LocalSelfAttention2d | AttentionStem, x: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield the weights of one image's windows in strips, each with its first row."""
    embeddings = [
        None if tensor is None else tensor.double() for tensor in (module.rel_rows, module.rel_cols)
    ]
    if isinstance(module, LocalSelfAttention2d):
        query, key, _ = module.project(x)
        weights = attention_weights(
            query.double(),
            None if key is None else key.double(),
            *embeddings,
            kernel_size=module.kernel_size,
            num_heads=module.num_heads,
            border=module.border,
        )
        yield 0, weights[0]
        return
    # Blocks do not see each other.
    step = _BLOCK_ROWS * module.block_size
    for top in range(0, x.shape[2], step):
        strip = x[:, :, top : top + step]
        weights = block_attention_weights(
            module.query(strip).double(),
            module.key(strip).double(),
            *embeddings,
            block_size=module.block_size,
            num_heads=module.num_heads,
        )
        yield top, weights[0]


def _run(
    model: nn.Module, inputs: dict[str, Any], layer: AttentionLayer
) -> tuple[Tensor, tuple[int, int]]:
    """Run a model on an image; returns what a layer gets, and the size of the padded image."""
    calls: list[Tensor] = []
    images: list[Tensor] = []
    backbone = getattr(model, "backbone", model)
    with (
        _watched(layer.module, calls),
        _watched(backbone, images),
        _in_eval_mode(model),
    ):
        model(inputs["image"][None].float() if backbone is model else [inputs])
    return calls[layer.call], tuple(images[0].shape[-2:])


@contextmanager
def _watched(module: nn.Module, inputs: list[Tensor]) -> Iterator[None]:
    """Collect what a module is called with in a block.

    A layer that is watched runs by itself, and not as one piece with its neighbours.
    """
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stride(image_size: Sequence[int], map_size: Sequence[int]) -> int:
    """Return the stride of a map, a power of 2: its sides are those of the image, rounded up."""
    ratio = max(image / extent for image, extent in zip(image_size, map_size, strict=True))
    return 2 ** math.ceil(math.log2(ratio))


def _attention_modules(model: nn.Module) -> dict[str, LocalSelfAttention2d | AttentionStem]:
    return {
        _user_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, (LocalSelfAttention2d, AttentionStem))
    }


def _user_name(path: str) -> str:
    for pattern, name in _NAMES:
        path = re.sub(pattern, name, path)
    return path


def _levels(model: nn.Module) -> Sequence[str]:
    """Return the levels that a head serves, in their order; empty without such a head."""
    return list(getattr(model, "head_in_features", ()))


def _unknown_layer(model: nn.Module, name: str, known: Sequence[str]) -> str:
    base = name.partition("@")[0]
    within = [other for other in known if other.startswith(f"{base}.")]
    if within:
        return f"layer {base} has several attention layers: name one of {_listed(within)}."
    modules = {_user_name(path): module for path, module in model.named_modules() if path}
    if base in modules:
        if _has_vector_attention(modules[base]):
            return _SAN
        kind = type(modules[base]).__name__
        return (
            f"layer {base} is a {kind} without attention; the attention layers are "
            f"{_listed(known)}."
        )
    near = nearest(name, known)
    return f"layer {name} does not exist{near if near != '.' else f': name {_listed(known)}.'}"


def _listed(names: Sequence[str]) -> str:
    return abbreviated_list(names, _SHOWN)


def _has_vector_attention(module: nn.Module) -> bool:
    vectors = (PairwiseAttention2d, PatchwiseAttention2d)
    return any(isinstance(child, vectors) for child in module.modules())
