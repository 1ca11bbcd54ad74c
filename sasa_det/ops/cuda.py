"""CUDA backend: the kernels of csrc/cuda, compiled when they are first used.

Before a GPU runs them for the first time, cuda_check.py compares their results for a small image
with those of the loop backend.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_check import why_not_correct
from .cuda_compiler import bind_context, launch, load_kernel
from .cuda_kernels import (
    HEAD_WIDTHS,
    LARGEST_ROW,
    MOST_LEVELS,
    WIDEST_KERNEL,
    Launch,
    Maps,
    Variant,
    embedding_sums_shape,
    launch_of,
    launch_of_embeddings,
    pixel_stride,
    tile_rows_of,
)

SUMMARY = "CUDA C++, windows on tensor cores, for CUDA tensors of bfloat16 or float16"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


# Why the kernels are not there, or None.
MISSING = None if _is_installed("cuda.bindings") else "cuda-bindings is not installed"

_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)
_MOST_BLOCKS = 65535  # of a grid's second and third dimension
# Pixels times heads: they are counted with 31 bits, with those of rows beside an image.
_MOST_VALUES = 2**30


def why_not(query: Tensor, num_heads: int, kernel_size: int, forced: bool = False) -> str | None:
    """Return why inputs like ``query`` cannot run here, or None if they can."""
    # Fake tensors stand for any size while a compiler traces.
    traced = type(query) not in (Tensor, torch.nn.Parameter)
    return why_not_like(
        query.device, query.dtype, query.shape, num_heads, kernel_size, traced=traced
    )


def why_not_like(
    device: torch.device,
    dtype: torch.dtype,
    shape: Sequence[int],
    num_heads: int,
    kernel_size: int,
    traced: bool = False,
) -> str | None:
    """Return why queries cannot run here, or None if they can.

    Args:
        device, dtype, shape: of the queries (N, C, H, W).
        num_heads, kernel_size: see :func:`sasa_det.ops.local_attention`.
        traced: whether only device and type are known, and nothing runs.
    """
    if MISSING:
        return MISSING
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type}"
    if dtype not in _DTYPES:
        return f"it takes bfloat16 or float16, not {dtype}"
    head_width = shape[1] // num_heads
    if head_width not in HEAD_WIDTHS:
        return f"it takes heads of width 8, 16, 32 or 64, not {head_width}"
    if kernel_size > WIDEST_KERNEL:
        return f"it takes a kernel_size of {WIDEST_KERNEL} at most, not {kernel_size}"
    if not torch.cuda.is_available():
        return "no GPU is available"
    variant = Variant(dtype, head_width, kernel_size)
    reason = _why_not_on(device, variant)
    if reason is None and not traced:
        reason = _why_not_of_size(shape, num_heads) or why_not_correct(device, variant)
    return reason


def why_not_capable(device: torch.device) -> str | None:
    """Return why a GPU is too old for the kernels of csrc/cuda, or None."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < _CAPABILITY:
        capability = f"{properties.major}.{properties.minor}"
        return f"it takes GPUs of compute capability 8.0 and higher, not {capability}"
    return None


def _why_not_on(device: torch.device, variant: Variant) -> str | None:
    if reason := why_not_capable(device):
        return reason
    properties = torch.cuda.get_device_properties(device)
    needed, there = variant.key_bytes(), properties.shared_memory_per_block_optin
    if needed > there:
        return f"it needs {needed} bytes of shared memory for a block, and the GPU has {there}"
    return None


def _why_not_of_size(shape: Sequence[int], num_heads: int) -> str | None:
    batch, channels, height, width = shape
    values = batch * height * width * num_heads
    if batch > _MOST_BLOCKS or height > 8 * _MOST_BLOCKS or values > _MOST_VALUES:
        return f"it does not take {batch} images of {height} x {width} with {num_heads} heads"
    if width * channels > LARGEST_ROW:
        return f"it does not take rows of {width} pixels of {channels} channels"
    return None


def why_not_pooled(device: torch.device, variant: Variant) -> str | None:
    """Return why the kernels of a variant that runs here cannot also pool, or None if they can."""
    variant = Variant(variant.dtype, variant.head_width, variant.kernel_size, pooled=True)
    return why_not_correct(device, variant)


def takes_maps(maps: Maps, num_heads: int) -> bool:
    """Tell whether maps, each of which can run here, can do so in one launch."""
    return (
        1 <= len(maps.sizes) <= MOST_LEVELS
        and tile_rows_of(maps) <= _MOST_BLOCKS
        and sum(maps.pixels) * num_heads <= _MOST_VALUES
    )


def forward(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend`; log_sum is to base 2."""
    variant = _variant(query, key, rel_rows, kernel_size, num_heads, mask)
    query, key, value = map(_channels_last, (query, key, value))
    batch, height, width, _ = query.shape
    output = _empty_like(query)
    log_sum = query.new_empty((batch, num_heads, height, width), dtype=torch.float32)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rel_rows": _exact(rel_rows),
        "rel_cols": _exact(rel_cols),
        "output": output,
        "log_sum": log_sum,
    }
    if batch > 0:
        start(launch_of("local_attention_forward", variant, **tensors), query)
    return output.permute(0, 3, 1, 2), log_sum


def backward(
    grad,
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    log_sum,
    kernel_size,
    num_heads,
    mask,
    results: Sequence[Tensor | None] | None = None,
):
    """See :func:`sasa_det.ops.operator.attend_backward`; the same bits in every run.

    ``results`` may have what takes the gradients of query, key and value, (N, H, W, C).
    """
    variant = _variant(query, key, rel_rows, kernel_size, num_heads, mask)
    images = (grad.to(query.dtype), query, key, value)
    grad, query, key, value = map(_channels_last, images)
    tensors = {
        "grad": grad,
        "query": query,
        "key": key,
        "value": value,
        "rel_rows": _exact(rel_rows),
        "rel_cols": _exact(rel_cols),
        "log_sum": log_sum,
        "minus_mean": torch.empty_like(log_sum),
    }
    has_position = rel_rows is not None
    sums = None
    if has_position:
        sums = query.new_empty(
            embedding_sums_shape(Maps.of(query), query.shape[3]), dtype=torch.float32
        )
    if results is None:
        results = list(map(_empty_like, (query, key, value)))
    grad_query, grad_key, grad_value = results
    if query.shape[0] > 0:
        written = {"grad_query": grad_query, "grad_embeddings": sums}
        start(launch_of("local_attention_query", variant, **tensors, **written), query)
        written = {"grad_key": grad_key, "grad_value": grad_value}
        start(launch_of("local_attention_key", variant, **tensors, **written), query)
    grad_rows, grad_cols = query.new_empty(0), query.new_empty(0)
    if has_position:
        grad_rows, grad_cols = _embedding_gradients(sums, rel_rows, rel_cols, variant, query)
    images = (
        query.new_empty(0) if x is None else x.permute(0, 3, 1, 2)
        for x in (grad_query, grad_key, grad_value)
    )
    return (*images, grad_rows, grad_cols)


def _embedding_gradients(sums, rel_rows, rel_cols, variant, query) -> tuple[Tensor, Tensor]:
    empty = torch.empty if query.shape[0] > 0 else torch.zeros
    rows, cols = (
        empty(x.shape, dtype=torch.float32, device=query.device) for x in (rel_rows, rel_cols)
    )
    if query.shape[0] > 0:
        start(launch_of_embeddings(variant, sums, rows, cols), query)
    return rows.to(rel_rows.dtype), cols.to(rel_cols.dtype)


def _empty_like(x: Tensor | None) -> Tensor | None:
    """Without gaps, which ``x`` may have between pixels."""
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _variant(query, key, rel_rows, kernel_size, num_heads, mask) -> Variant:
    head_width = query.shape[1] // num_heads
    content, position = key is not None, rel_rows is not None
    return Variant(query.dtype, head_width, kernel_size, mask, content, position)


def _channels_last(x: Tensor | None) -> Tensor | None:
    """(N, C, H, W) to (N, H, W, C), copied unless the kernels can read it as it is."""
    if x is None:
        return None
    x = x.permute(0, 2, 3, 1)
    stride = pixel_stride(x)
    if stride is None or stride * x.shape[2] > LARGEST_ROW:
        return x.contiguous()
    return x


def _exact(embedding: Tensor | None) -> Tensor | None:
    return None if embedding is None else embedding.float().contiguous()


def start(kernel: Launch, like: Tensor) -> None:
    """Start a kernel on the device of a tensor, in PyTorch's current stream."""
    with torch.cuda.device_of(like):
        device = like.device.index
        bind_context(device)
        function = load_kernel(kernel.header, kernel.name, device, kernel.shared_bytes)
        stream = torch.cuda.current_stream(device).cuda_stream
        launch(function, kernel.grid, kernel.threads, kernel.shared_bytes, kernel.arguments, stream)
