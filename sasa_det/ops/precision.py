"""The precision the operators compute in, whatever the type of their inputs."""

import functools
from collections.abc import Callable

import torch

__all__ = ["accumulation_dtype", "without_autocast"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of logits and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable) -> Callable:
    """Let a function whose first argument is a tensor run outside of autocast.

    Autocast stays active inside an operator and would send its products back to half precision.
    """

    @functools.wraps(function)
    def wrapped(first, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapped
