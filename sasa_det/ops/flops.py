"""FLOP formulas of the attention operators, for torch's and for fvcore's counters.

They count as the paper does: every pixel costs window x channels multiply-adds for each of q.k,
q.r and the weighted sum of values, and nothing for the softmax; a kernel that finds q.r with
fewer operations changes nothing. torch counts a multiply-add as 2 FLOPs, fvcore as 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# They define the operators.
from . import (  # noqa: F401
    block_attention,
    joined_attention,
    operator,
    stem_attention,
    vector_aggregation,
)
from .blocks import STEM_BLOCK

Shape = Sequence[int]


# Each takes those of an operator's arguments that it needs, by name; shapes in place of tensors.
def _local_attention_macs(
    query: Shape, key: Shape | None, rel_rows: Shape | None, kernel_size: int, **_
) -> int:
    terms = (key is not None) + (rel_rows is not None) + 1
    return terms * kernel_size**2 * prod(query)


def _joined_attention_macs(
    joined: Shape, rel_rows: Shape | None, kernel_size: int, num_heads: int, content: bool, **_
) -> int:
    query = prod(joined) // (2 + content)
    return (1 + content + (rel_rows is not None)) * kernel_size**2 * query


def _block_attention_macs(query: Shape, embedding: Shape | None, block_size: int, **_) -> int:
    return (2 + (embedding is not None)) * block_size**2 * prod(query)


def _mixed_values_macs(x: Shape, weight: Shape, **_) -> int:
    mixtures, channels, in_channels = weight
    return prod(x) // in_channels * mixtures * channels * (in_channels + 1)


def _stem_attention_macs(
    x: Shape, query: Shape, value: Shape, mixing: Shape | None, rel_rows: Shape | None, **_
) -> int:
    n, in_channels, height, width = x
    projection = prod(x) * query[0]
    values = projection if mixing is None else _mixed_values_macs(x, value)
    attention = _block_attention_macs((n, query[0], height, width), rel_rows, STEM_BLOCK)
    return 2 * projection + values + attention


def _vector_aggregation_macs(value: Shape, kernel_size: int, **_) -> int:
    return kernel_size**2 * prod(value)


def _window_product_macs(query: Shape, kernel_size: int, **_) -> int:
    return kernel_size**2 * prod(query)


_FORWARD = {
    "local_attention": _local_attention_macs,
    "joined_attention": _joined_attention_macs,
    "block_attention": _block_attention_macs,
    "mixed_values": _mixed_values_macs,
    "stem_attention": _stem_attention_macs,
    "stem_attention_normalized": _stem_attention_macs,
    "stem_attention_pooled": _stem_attention_macs,
    "vector_aggregation": _vector_aggregation_macs,
    "window_product": _window_product_macs,
}


def _count(name: str, macs: Callable[..., int], arguments: Sequence[Any]) -> int:
    """Count an operator's multiply-adds from the values of its first arguments."""
    schema = getattr(torch.ops.sasa_det, name).default._schema
    names = (argument.name for argument in schema.arguments)
    return macs(**dict(zip(names, arguments, strict=False)))


def _register(name: str, macs: Callable[..., int], flops_of_mac: int) -> None:
    @register_flop_formula(getattr(torch.ops.sasa_det, name))
    def formula(*arguments, out_shape=None, **kwargs) -> int:
        return flops_of_mac * _count(name, macs, arguments)


for _name, _macs in _FORWARD.items():
    _register(_name, _macs, 2)
    # Each product of the forward pass has two in the backward pass, as for a convolution.
    if _name != "stem_attention_pooled":
        _register(f"{_name}_backward", _macs, 4)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return handles that let ``fvcore.nn.FlopCountAnalysis`` count the attention operators.

    Returns:
        dict[str, callable]: operator name to handle, for
        ``FlopCountAnalysis(model, inputs).set_op_handle(**handles)``; the unit is fvcore's, one
        multiply-add.
    """

    def handle(name: str, macs: Callable[..., int], inputs: list[Any], outputs: list[Any]) -> int:
        return _count(name, macs, [_shape_or_value(x) for x in inputs])

    return {f"sasa_det::{name}": partial(handle, name, macs) for name, macs in _FORWARD.items()}


def _shape_or_value(value: Any) -> Any:
    """Read a value of a traced graph: a tensor's shape, or a constant."""
    if value.isCompleteTensor():
        return value.type().sizes()
    return value.toIValue()
