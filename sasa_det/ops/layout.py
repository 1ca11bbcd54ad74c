"""How pixels lie in memory, for kernels that take (N, H, W, C) with gaps between pixels."""

from torch import Tensor


def stride_between_pixels(x: Tensor) -> int | None:
    """Return the elements from one pixel of (N, H, W, C) to the next, or None if it does not fit.

    Kernels take channels, and rows and images of pixels, without gaps between them, as of slices of
    channels of one tensor.
    """
    _, height, width, channels = x.shape
    # Each dimension but the channels, and the pixels that its next index is further on.
    steps = [(d, n) for d, n in ((2, 1), (1, width), (0, height * width)) if x.shape[d] > 1]
    stride = next((x.stride(d) // n for d, n in steps), channels)
    fits = all(x.stride(d) == n * stride for d, n in steps)
    return stride if fits and (channels == 1 or x.stride(3) == 1) and stride >= channels else None
