"""The choices that there are for the CUDA kernels of local attention, timed beside each other.

A warp that has two parts of the tile loads and executes less, and there are half as many of them.
How many blocks an SM is to hold decides how many registers a thread has, and how much there is to
do while one block waits for its copies. What is best depends on the GPU.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..ops import cuda
from ..ops.cuda_compiler import compile_kernel
from ..ops.cuda_kernels import (
    HEAD_WIDTHS,
    KERNELS,
    Maps,
    Variant,
    choices_of,
    embedding_sums_shape,
    launch_of,
)
from ..ops.gpu_timing import Run, time_calls
from .gpu_tables import Choice

_HEADS = 8
_BATCH = 8
# Pixels of a side, where RetinaNet-50 has most layers of a head width.
_SIZES = {8: 160, 16: 80, 32: 80, 64: 20}


def measure_choices(kernel: str, rounds: int) -> list[Choice]:
    """Time all choices of one of :data:`sasa_det.ops.cuda_kernels.KERNELS`, for each head width."""
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    rows = []
    for head_width in HEAD_WIDTHS:
        variants = {str(x.split): x for x in choices_of(kernel, head_width)}
        size = _SIZES[head_width]
        makes = {
            name: partial(make_launch, kernel, variant, _BATCH, _HEADS, size, "cuda")
            for name, variant in variants.items()
        }
        seconds, problems = time_calls(makes, rounds)
        for i, (name, variant) in enumerate(variants.items()):
            header, full_name = KERNELS[kernel].header, variant.name(kernel)
            taken = None
            if name in seconds:
                taken = compile_kernel(header, full_name, architecture).resources
            choice = Choice(
                kernel.removeprefix("local_attention_"),
                f"{_HEADS * head_width}@{size}",
                name,
                in_use=i == 0,
                taken=taken,
                seconds=seconds.get(name),
                why_not=problems.get(name),
            )
            rows.append(choice)
    return rows


def make_launch(
    kernel: str, variant: Variant, batch: int, heads: int, size: int, device: str
) -> Run:
    """Make the tensors of a kernel, and return what starts it and returns what it writes.

    Queries, keys and values are slices of one tensor, as layers have them.

    Args:
        kernel: one of :data:`sasa_det.ops.cuda_kernels.KERNELS`.
        variant: what it is compiled for, with contents and positions.
        batch, heads, size: number of images, and of heads, and the pixels of a side.
        device: where it runs.
    """
    generator = torch.Generator(device).manual_seed(0)
    channels = heads * variant.head_width

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    # Logits are small, so that all 49 weights of a window are about the same.
    joined = random(batch, size, size, 3 * channels, dtype=variant.dtype).mul_(0.1)
    query, key, value = joined.split(channels, -1)
    embeddings = (heads, variant.head_width // 2, variant.kernel_size)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rel_rows": random(*embeddings),
        "rel_cols": random(*embeddings),
    }
    plane = (batch, heads, size, size)
    output = torch.empty(query.shape, dtype=variant.dtype, device=device)
    if kernel == "local_attention_forward":
        written = {"output": output, "log_sum": torch.empty(plane, device=device)}
    else:
        tensors["grad"] = torch.randn_like(output)
        tensors["log_sum"] = torch.full(plane, math.log2(variant.kernel_size**2), device=device)
        # The key kernel reads what the query kernel has written.
        minus_mean = torch.zeros(plane, device=device)
        if kernel == "local_attention_query":
            sums = embedding_sums_shape(Maps.of(query), channels)
            written = {"grad_query": output, "grad_embeddings": torch.empty(sums, device=device)}
            written["minus_mean"] = minus_mean
        else:
            tensors["minus_mean"] = minus_mean
            written = {"grad_key": output, "grad_value": torch.empty_like(output)}
    launch = launch_of(kernel, variant, **tensors, **written)

    def run() -> list[Tensor]:
        cuda.start(launch, tensors["query"])  # whose launch has the addresses of all
        return list(written.values())

    return run


def choices_parts(rounds: int) -> list[tuple[str, Callable[[], list[Choice]]]]:
    """Return name and measurement of each kernel's choices."""
    return [(f"choices of {name}", partial(measure_choices, name, rounds)) for name in KERNELS]
