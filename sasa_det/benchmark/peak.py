"""FLOPs: how many a call has, and how many the machine's best product reaches a second."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .measure import time_rounds

_CALLS = 21
_LARGE_MATRIX = {"cuda": 8192, "cpu": 2048}
_CONVOLVE = partial(F.conv2d, padding=1)


def count_flops(build: Callable[[], Callable[..., object]], *shapes: Sequence[int]) -> int:
    """Count the floating-point operations of a forward pass; a multiply-add is 2.

    The pass runs on meta tensors, for which every operator is one that counters know: on a CPU, the
    kernels of this project take the place of whole blocks.

    Args:
        build: makes the module, or another callable.
        shapes: of its inputs.

    Returns:
        int: the FLOPs. Attention counts as in the paper, see :mod:`sasa_det.ops.flops`.
    """
    with torch.device("meta"), torch.no_grad():
        call = build()
        if isinstance(call, nn.Module):
            call.eval()
        inputs = [torch.empty(tuple(shape)) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            call(*inputs)
    return counter.get_total_flops()


def of_pass(forward_flops: int, training: bool) -> int:
    """Return the FLOPs of a pass: each product of a forward pass has two in the backward pass."""
    return 3 * forward_flops if training else forward_flops


def peak_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOPs a second of the machine's best product.

    Args:
        device: "cpu" or "cuda".
        dtype: of its factors.

    Returns:
        float: the best of some calls of the best of products of two large and two small matrices,
        and 3x3 convolutions of a large and a small map. Small ones end before a processor that is
        shared turns to something else.
    """
    large = _LARGE_MATRIX[device]
    products = {
        "large matrices": (torch.mm, (large, large), (large, large)),
        "small matrices": (torch.mm, (512, 512), (512, 512)),
        "large map": (_CONVOLVE, (1, 256, 80, 80), (256, 256, 3, 3)),
        "small map": (_CONVOLVE, (1, 128, 32, 32), (128, 128, 3, 3)),
    }
    runs, flops = {}, {}
    for name, (multiply, *shapes) in products.items():
        factors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        runs[name] = partial(multiply, *factors)
        flops[name] = count_flops(lambda call=multiply: call, *shapes)
    seconds = time_rounds(runs, _CALLS, device)
    return max(flops[name] / min(values) for name, values in seconds.items())


def has_bfloat16() -> bool | None:
    """Tell whether this processor multiplies in bfloat16; None if PyTorch does not say."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Older versions of PyTorch.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    told = [getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name)]
    return any(told) if told else None
