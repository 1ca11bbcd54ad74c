"""FLOP formulas of the attention operators, for torch's and for fvcore's counters.

They count as the paper does: every pixel costs window x channels multiply-adds for each of q.k,
q.r and the weighted sum of values, and nothing for the softmax; a kernel that finds q.r with
fewer operations changes nothing. torch counts a multiply-add as 2 FLOPs, fvcore as 1.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import block_attention, operator  # noqa: F401  (they define the operators)
from .stem_attention import STEM_BLOCK

Shape = Sequence[int]


def _local_attention_macs(
    query: Shape, key: Shape | None, value: Shape, rel_rows: Shape | None, _, kernel_size: int
) -> int:
    terms = (key is not None) + (rel_rows is not None) + 1
    return terms * kernel_size**2 * prod(query)


def _block_attention_macs(
    query: Shape, key: Shape, value: Shape, embedding: Shape | None, block_size: int
) -> int:
    return (2 + (embedding is not None)) * block_size**2 * prod(query)


def _mixed_values_macs(x: Shape, weight: Shape, mixing: Shape) -> int:
    mixtures, channels, in_channels = weight
    return prod(x) // in_channels * mixtures * channels * (in_channels + 1)


def _stem_attention_macs(
    x: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    mixing: Shape | None,
    rel_rows: Shape | None,
    rel_cols: Shape | None,
) -> int:
    n, in_channels, height, width = x
    projected = (n, query[0], height, width)
    projection = prod(x) * query[0]
    values = projection if mixing is None else _mixed_values_macs(x, value, mixing)
    attention = _block_attention_macs(projected, projected, projected, rel_rows, STEM_BLOCK)
    return 2 * projection + values + attention


_ops = torch.ops.sasa_det


@register_flop_formula(_ops.local_attention)
def _(query, key, value, rel_rows, rel_cols, kernel_size, *args, out_shape=None, **kwargs) -> int:
    return 2 * _local_attention_macs(query, key, value, rel_rows, rel_cols, kernel_size)


@register_flop_formula(_ops.local_attention_backward)
def _(
    grad,
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    log_sum,
    kernel_size,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    # Each product of the forward pass has two in the backward pass, as for a convolution.
    return 4 * _local_attention_macs(query, key, value, rel_rows, rel_cols, kernel_size)


@register_flop_formula(_ops.block_attention)
def _(query, key, value, embedding, block_size, *args, out_shape=None, **kwargs) -> int:
    return 2 * _block_attention_macs(query, key, value, embedding, block_size)


@register_flop_formula(_ops.block_attention_backward)
def _(grad, query, key, value, embedding, block_size, *args, out_shape=None, **kwargs) -> int:
    return 4 * _block_attention_macs(query, key, value, embedding, block_size)


@register_flop_formula(_ops.mixed_values)
def _(x, weight, mixing, *args, out_shape=None, **kwargs) -> int:
    return 2 * _mixed_values_macs(x, weight, mixing)


@register_flop_formula(_ops.mixed_values_backward)
def _(grad, x, weight, mixing, *args, out_shape=None, **kwargs) -> int:
    return 4 * _mixed_values_macs(x, weight, mixing)


@register_flop_formula([_ops.stem_attention, _ops.stem_attention_pooled])
def _(x, query, key, value, mixing, rel_rows, rel_cols, *args, out_shape=None, **kwargs) -> int:
    return 2 * _stem_attention_macs(x, query, key, value, mixing, rel_rows, rel_cols)


@register_flop_formula(_ops.stem_attention_backward)
def _(
    grad, x, query, key, value, mixing, rel_rows, rel_cols, *args, out_shape=None, **kwargs
) -> int:
    return 4 * _stem_attention_macs(x, query, key, value, mixing, rel_rows, rel_cols)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return handles that let ``fvcore.nn.FlopCountAnalysis`` count the attention operators.

    Returns:
        dict[str, callable]: operator name to handle, for
        ``FlopCountAnalysis(model, inputs).set_op_handle(**handles)``; the unit is fvcore's, one
        multiply-add.
    """

    def handle(macs: Callable[..., int], arguments: int):
        def count(inputs: list[Any], outputs: list[Any]) -> int:
            return macs(*(_shape_or_value(x) for x in inputs[:arguments]))

        return count

    return {
        "sasa_det::local_attention": handle(_local_attention_macs, 6),
        "sasa_det::block_attention": handle(_block_attention_macs, 5),
        "sasa_det::mixed_values": handle(_mixed_values_macs, 3),
        "sasa_det::stem_attention": handle(_stem_attention_macs, 7),
        "sasa_det::stem_attention_pooled": handle(_stem_attention_macs, 7),
    }


def _shape_or_value(value: Any) -> Any:
    """Read a value of a traced graph: a tensor's shape, or a constant."""
    if value.isCompleteTensor():
        return value.type().sizes()
    return value.toIValue()
