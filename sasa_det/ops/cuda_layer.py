"""A layer of attention on a GPU as one call of C++, and what csrc/gpu_layer.cpp starts for it."""

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import cpu
from .cuda_compiler import bind_context, load_kernel, primary_context
from .cuda_kernels import (
    KERNELS,
    Launch,
    Maps,
    Variant,
    embedding_sums_shape,
    launch_of,
    launch_of_embeddings,
)
from .operator import say_once
from .structures import pointers_of


def is_there(device: torch.device) -> bool:
    """Tell whether layers on a device are called from C++, which the CPU's extension has."""
    return device.type == "cuda" and cpu.MISSING is None


def attend(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    variant: Variant,
    maps: Maps | None = None,
) -> Tensor:
    """Run projections and equation 3 as one node of autograd.

    Args:
        x: (N, C_in, H, W) on a GPU, or the pixels (P, C_in) of several levels.
        weights: of query, key if any, and value, each (C, C_in, 1, 1).
        biases: of each of them, (C,), or none.
        rel_rows, rel_cols: (num_heads, C // num_heads // 2, kernel_size) or None.
        num_heads: of the layer.
        variant: of the kernels; products have its dtype.
        maps: whose pixels are in (P, C_in).

    Returns:
        (N, C, H, W) of the variant's dtype, half as high and wide, rounded up, if it is pooled; in
        the layout channels_last; or (P, C).
    """
    say_once("cuda")
    if maps is None:
        maps = Maps(x.shape[0], (tuple(x.shape[2:]),))
    tiles, plans = plans_of(x.device.index, variant, maps, weights[0].shape[0])
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return torch.ops.sasa_det_gpu.joined_layer(
        *(x, rel_rows, rel_cols, weights, biases, num_heads),
        *(variant.dtype, variant.pooled, tiles, stream, plans),
    )


@lru_cache(maxsize=4096)
def plans_of(device: int, variant: Variant, maps: Maps, channels: int) -> tuple[int, list[Tensor]]:
    """Return how the kernels of a layer start, whatever the tensors are.

    Those of the backward pass are loaded as well: a training step may be captured as a CUDA graph,
    in which nothing can be loaded, after the layer has run without gradients.

    Args:
        device: the GPU's number.
        variant: of the kernels.
        maps: that the layer takes.
        channels: of its output.

    Returns:
        (tiles, plans): the number of sums of :func:`embedding_sums_shape`, and of each kernel the
        numbers that csrc/gpu_layer.cpp reads.
    """
    count = 3 if variant.content else 2
    pixels = sum(maps.pixels)
    joined = torch.empty(pixels, count * channels, dtype=variant.dtype, device="meta")
    query, *key, value = joined.chunk(count, 1)
    output = torch.empty(pixels, channels, dtype=variant.dtype, device="meta")
    sums = torch.empty(embedding_sums_shape(maps, channels), device="meta")
    # Without addresses: of these, the strides between pixels count.
    slices = {"query": query, "key": key[0] if key else None, "value": value}
    gradients = {f"grad_{name}": x for name, x in slices.items()}
    images = {**slices, **gradients, "output": output, "grad": output}
    others = dict.fromkeys(("rel_rows", "rel_cols", "log_sum", "minus_mean", "grad_embeddings"))
    launches = [launch_of(name, variant, maps, **images, **others) for name in KERNELS]
    if variant.position:
        launches.append(launch_of_embeddings(variant, sums, sums, sums))
    return sums.shape[0], [_plan(launch, device) for launch in launches]


def _plan(launch: Launch, device: int) -> Tensor:
    kind = type(launch.arguments)
    offsets = [getattr(kind, name).offset for name in pointers_of(kind)]
    words = memoryview(bytes(launch.arguments)).cast("q").tolist()
    kernel = (*driver_functions(), context_of(device), function_of(launch, device))
    start = [*kernel, *launch.grid, launch.threads, launch.shared_bytes]
    numbers = [*start, len(offsets), len(words), *offsets, *words]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def function_of(launch: Launch, device: int) -> int:
    """Return the address of a kernel that is loaded on a GPU."""
    with torch.cuda.device(device):
        bind_context(device)
        return int(load_kernel(launch.header, launch.name, device, launch.shared_bytes))


def context_of(device: int) -> int:
    """Return the address of PyTorch's context of a GPU."""
    return int(primary_context(device))


@cache
def driver_functions() -> tuple[int, int]:
    """Return the addresses of the driver's cuLaunchKernel and cuCtxSetCurrent."""
    driver = ctypes.CDLL("libcuda.so.1")
    functions = (driver.cuLaunchKernel, driver.cuCtxSetCurrent)
    return tuple(ctypes.cast(x, ctypes.c_void_p).value for x in functions)
