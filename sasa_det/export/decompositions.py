"""The attention operators as standard operators, for files that run without this package.

:data:`DECOMPOSITIONS` is the one table of them. ``ExportedProgram.run_decompositions`` takes it as
it is; :class:`Decompose` applies it in traces. While ``torch.onnx.export`` runs, the operators take
these forms by themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops import standard_blocks, tiled_attention
from ..ops.aggregation import aggregate
from ..ops.precision import accumulation_dtype


class Decompose(TorchFunctionMode):
    """A context in which the attention operators run, and are traced, as standard ones.

    Args:
        operators: what stands for them.
    """

    def __init__(self, operators: Mapping[Callable, Callable] | None = None):
        super().__init__()
        self._stand_ins = DECOMPOSITIONS if operators is None else operators

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        return self._stand_ins.get(func, func)(*args, **(kwargs or {}))


def _local_attention(*arguments, heads_at_once: bool = False) -> tuple[Tensor, Tensor]:
    """Stand for ``sasa_det::local_attention``; its second result is for gradients, and empty."""
    *arguments, _ = arguments  # the backend
    output = tiled_attention.local_attention(*arguments, heads_at_once=heads_at_once)
    return output, output.new_empty(0, dtype=accumulation_dtype(output.dtype))


def _vector_aggregation(weight: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    return aggregate(value, weight, kernel_size=kernel_size)


_OPERATORS = torch.ops.sasa_det

DECOMPOSITIONS: dict[Callable, Callable] = {
    _OPERATORS.local_attention.default: _local_attention,
    _OPERATORS.block_attention.default: standard_blocks.block_attention,
    _OPERATORS.mixed_values.default: standard_blocks.mixed_values,
    _OPERATORS.stem_attention.default: standard_blocks.stem_attention,
    _OPERATORS.stem_attention_pooled.default: standard_blocks.pooled_stem_attention,
    _OPERATORS.vector_aggregation.default: _vector_aggregation,
}

# Of fewer operators, which take more memory at a time.
SHORT_DECOMPOSITIONS = {
    **DECOMPOSITIONS,
    _OPERATORS.local_attention.default: partial(_local_attention, heads_at_once=True),
}
