"""Checks of the arguments of operators and layers, which name what is wrong."""

from collections.abc import Collection

import torch
from torch import Tensor


def check_choice(name: str, value: object, allowed: Collection) -> None:
    """Raise ValueError, with ``name`` in it, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless the window extent is an odd integer of at least 1."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
        raise ValueError(f"kernel_size must be an odd integer >= 1, got {kernel_size!r}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}.")


def check_type(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``x`` has the type of the weights, which autocast makes needless."""
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"the input of {name} must have the type of its weights, {dtype}, got {x.dtype}."
        )


def check_heads(channels: int, num_heads: int, name: str = "channels") -> None:
    """Raise ValueError unless ``num_heads`` divides ``channels`` into heads of even width."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}.")
    if channels % num_heads:
        raise ValueError(f"{name} {channels} must be a multiple of num_heads {num_heads}.")
    if channels // num_heads % 2:
        raise ValueError(
            f"{name} {channels} over num_heads {num_heads} gives heads of width "
            f"{channels // num_heads}; the width must be even, half for the row and half for the "
            "column embedding."
        )


def check_arguments(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    kernel_size: int,
    num_heads: int,
) -> None:
    """Raise ValueError unless the arguments are those of a local attention; no key, no q.k."""
    check_kernel_size(kernel_size)
    if query.dim() != 4:
        raise ValueError(f"query must be (N, C, H, W), got shape {tuple(query.shape)}.")
    check_heads(query.shape[1], num_heads)
    if min(query.shape[1:]) < 1:
        raise ValueError(f"query must have C, H, W >= 1, got shape {tuple(query.shape)}.")
    images = {"query": query, "value": value, **({} if key is None else {"key": key})}
    for name, tensor in images.items():
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} must have query's shape {tuple(query.shape)}, got {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have query's type and device, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}."
            )
    if (rel_rows is None) != (rel_cols is None):
        raise ValueError("rel_rows and rel_cols must be given together or both be None.")
    if rel_rows is None:
        if key is None:
            raise ValueError("content=False leaves only q.r and so needs rel_rows and rel_cols.")
        return
    shape = (num_heads, query.shape[1] // num_heads // 2, kernel_size)
    for name, tensor in {"rel_rows": rel_rows, "rel_cols": rel_cols}.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be (num_heads, C // num_heads // 2, kernel_size) = {shape}, "
                f"got {tuple(tensor.shape)}."
            )
