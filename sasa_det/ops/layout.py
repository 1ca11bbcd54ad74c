"""How pixels lie in memory, for kernels that take (N, H, W, C) with gaps between pixels."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor


def stride_between_pixels(x: Tensor) -> int | None:
    """Return the elements from one pixel of (N, H, W, C) to the next, or None if it does not fit.

    Kernels take channels, and rows and images of pixels, without gaps between them, as of slices of
    channels of one tensor.
    """
    return _stride_between_pixels(tuple(x.shape), x.stride())


@lru_cache(maxsize=1024)  # the same layers call it in every step, and GPUs do not wait
def _stride_between_pixels(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    _, height, width, channels = shape
    # Each dimension but the channels, and the pixels that its next index is further on.
    steps = [(d, n) for d, n in ((2, 1), (1, width), (0, height * width)) if shape[d] > 1]
    stride = next((strides[d] // n for d, n in steps), channels)
    fits = all(strides[d] == n * stride for d, n in steps)
    return stride if fits and (channels == 1 or strides[3] == 1) and stride >= channels else None
