"""The precision the operators compute in, whatever the type of their inputs."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of logits and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_disabled(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast is off, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable) -> Callable:
    """Let a function whose first argument is a tensor run outside of autocast.

    Autocast stays active inside an operator and would send its products back to half precision.
    """

    @functools.wraps(function)
    def wrapped(first, *args, **kwargs):
        with autocast_disabled(first.device):
            return function(first, *args, **kwargs)

    return wrapped
