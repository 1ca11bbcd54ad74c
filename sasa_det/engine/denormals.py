"""Denormal numbers, which processors handle slowly."""

import torch

__all__ = ["flush_denormals"]


def flush_denormals() -> None:
    """Let the processor take numbers below 1e-38 for zero.

    Softmax weights of distant pixels and their gradients become that small in training and would
    slow it down. To be called first in a process: torch's threads inherit the setting when they
    start.
    """
    torch.set_flush_denormal(True)
