"""Local attention whose queries, keys and values are one tensor, for the CUDA kernels.

One matrix product makes all three. The kernels read its slices, and write the gradients of all
three into one tensor, which is what the gradients of that product are products with.
"""

import torch
from torch import Tensor

from . import cuda
from .gradient import define_operator, fake_gradients, register_gradient
from .operator import say_once

_TENSORS = "Tensor joined, Tensor? rel_rows, Tensor? rel_cols"
_OPTIONS = "int kernel_size, int num_heads, bool content, bool mask"


@define_operator("joined_attention", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")
def attend_joined(joined, rel_rows, rel_cols, kernel_size, num_heads, content, mask):
    """Run equation 3 on the CUDA kernels.

    Args:
        joined: (N, 3 C, H, W) in the layout channels_last: queries, keys and values, in this order,
            or (N, 2 C, H, W) without ``content``, which has no keys.
        rel_rows, rel_cols, kernel_size, num_heads, content: see
            :func:`sasa_det.ops.local_attention`.
        mask: True for border "mask", False for "zero".

    Returns:
        (output, log_sum): (N, C, H, W) in the layout channels_last, and what the backward pass
        needs.
    """
    say_once("cuda")
    images = _slices(joined, content)
    return cuda.forward(*images, rel_rows, rel_cols, kernel_size, num_heads, mask)


@attend_joined.register_fake
def _(joined, rel_rows, rel_cols, kernel_size, num_heads, content, mask):
    value = _slices(joined, content)[2]
    output = torch.empty_like(value, memory_format=torch.channels_last)
    shape = (value.shape[0], num_heads, *value.shape[2:])
    return output, joined.new_empty(shape, dtype=torch.float32)


@define_operator(
    "joined_attention_backward",
    f"(Tensor grad, {_TENSORS}, Tensor log_sum, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def attend_joined_backward(
    grad, joined, rel_rows, rel_cols, log_sum, kernel_size, num_heads, content, mask
):
    """Return the gradients of ``joined``, in its layout, and of both embeddings."""
    images = _slices(joined, content)
    result = torch.empty_like(joined, memory_format=torch.channels_last)
    slices = [None if x is None else x.permute(0, 2, 3, 1) for x in _slices(result, content)]
    *_, grad_rows, grad_cols = cuda.backward(
        *(grad, *images, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask), results=slices
    )
    return result, grad_rows, grad_cols


register_gradient(attend_joined, attend_joined_backward, num_tensors=3)


@attend_joined_backward.register_fake
def _(grad, joined, *arguments):
    _, *gradients = fake_gradients(3)(grad, joined, *arguments)
    return torch.empty_like(joined, memory_format=torch.channels_last), *gradients


def _slices(joined: Tensor, content: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    if content:
        return joined.chunk(3, 1)
    query, value = joined.chunk(2, 1)
    return query, None, value
