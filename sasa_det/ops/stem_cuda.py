"""CUDA kernels of the stem, csrc/cuda/stem_attention.cuh: from the image to each block's extremes.

The kernels take few and small tensors, of which PyTorch makes and differentiates the rest: for each
head a matrix M with q_i . k_j = x_i M x_j, and for each offset a vector whose product with x_i is
q_i . r.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, standard_blocks
from .blocks import place_matrices
from .cuda_check import CHECK_VARIABLE
from .cuda_compiler import CompilerError, launch, load_kernel
from .joined_attention import is_looked_at
from .precision import autocast_disabled

logger = logging.getLogger(__name__)

SIDE = 4
THREADS = 128  # as STEM_THREADS in the kernels' file, and so are the next lines
_PIXELS, _OFFSETS = SIDE**2, 2 * SIDE - 1
HEADER = "stem_attention.cuh"
HEAD_WIDTHS = (4, 8, 16, 32)
MOST_CHANNELS_OF_IMAGE = 4
_GROUPS = (32, 64, 128)  # threads for a block of the image
TOLERANCE = 1e-3  # of the largest value of each result, or of 1
_LOG2_E = 1.4426950408889634
# Blocks of threads for a multiprocessor: each goes through many blocks of the image.
_BLOCKS_OF_PROCESSOR = 4


class _Stem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("height", "width", "rows", "cols", "blocks")),
        *((name, ctypes.c_int) for name in ("channels", "heads", "group_threads")),
        *((f"{name}_stride", ctypes.c_longlong) for name in ("image", "channel", "row", "col")),
        *((name, ctypes.c_void_p) for name in ("image", "bilinear", "rel_rows", "rel_cols")),
        *((name, ctypes.c_void_p) for name in ("values", "weight")),
    )


def _arguments(pointers: str) -> type[ctypes.Structure]:
    fields = [("stem", _Stem), *((name, ctypes.c_void_p) for name in pointers.split())]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


_ARGUMENTS = {
    "stem_attention_forward": _arguments("extremes moments"),
    "stem_attention_backward": _arguments("grad peak slope constant grad_values grad_logits"),
}


@dataclass(frozen=True)
class StemInputs:
    """What both kernels take, float32.

    Attributes:
        image: (N, C_in, H, W), with any strides.
        bilinear: (num_heads, C_in, C_in).
        rel_rows, rel_cols: (num_heads, 7, C_in).
        values: (16, C_in, C), the matrix of each place of a block.
        weight: (C,), whose sign says which extreme of a block counts.
    """

    image: Tensor
    bilinear: Tensor
    rel_rows: Tensor
    rel_cols: Tensor
    values: Tensor
    weight: Tensor

    @property
    def num_heads(self) -> int:
        return self.bilinear.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Images, and rows and columns of blocks."""
        return (self.image.shape[0], *(-(-size // SIDE) for size in self.image.shape[2:]))

    @property
    def group_threads(self) -> int:
        needed = max(self.channels, _PIXELS * self.num_heads)
        return next(threads for threads in _GROUPS if threads >= needed)

    def groups(self, grid: int) -> int:
        """Return how many groups of threads there are in a grid of blocks of threads."""
        return grid * (THREADS // self.group_threads)


@dataclass(frozen=True)
class StemLaunch:
    """A kernel of the stem and what it is started with, in blocks of :data:`THREADS`."""

    name: str
    shared_bytes: int
    arguments: ctypes.Structure


def launch_of(kernel: str, inputs: StemInputs, **tensors: Tensor) -> StemLaunch:
    """Return how a kernel is started.

    Args:
        kernel: "stem_attention_forward" or "stem_attention_backward".
        inputs: what both take.
        **tensors: what the structure of its arguments names in the kernels' file, float32.
    """
    image, heads, channels = inputs.image, inputs.num_heads, inputs.channels
    in_channels = image.shape[1]
    count, rows, cols = inputs.blocks
    sizes = (*image.shape[2:], rows, cols, count * rows * cols)
    pointers = (image, inputs.bilinear, inputs.rel_rows, inputs.rel_cols)
    stem = _Stem(
        *(*sizes, channels, heads, inputs.group_threads),
        *image.stride(),
        *(x.data_ptr() for x in (*pointers, inputs.values, inputs.weight)),
    )
    arguments = _ARGUMENTS[kernel](stem, **{name: x.data_ptr() for name, x in tensors.items()})
    row = 4 * (channels + 4)
    group = 4 * in_channels * _PIXELS + 2 * _PIXELS * row + 80 * heads * _PIXELS
    matrices = 4 * in_channels * _PIXELS * channels
    name = f"{kernel}<{in_channels}, {channels // heads}>"
    shared_bytes = matrices + THREADS // inputs.group_threads * group
    return StemLaunch(name, shared_bytes, arguments)


def why_not(x: Tensor, channels: int, num_heads: int) -> str | None:
    """Return why images like ``x`` cannot run here, or None if they can."""
    if cuda.MISSING:
        return cuda.MISSING
    if x.device.type != "cuda":
        return f"it takes CUDA tensors, not {x.device.type}"
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it does not run in traces and compiled models"
    if is_looked_at():
        return "operators are looked at one by one"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {x.dtype}"
    if x.requires_grad:
        return "it has no gradient of the image"
    if x.shape[1] > MOST_CHANNELS_OF_IMAGE or x.numel() == 0:
        return f"it does not take images of shape {tuple(x.shape)}"
    width = channels // num_heads
    if width not in HEAD_WIDTHS or max(channels, _PIXELS * num_heads) > _GROUPS[-1]:
        return f"it does not take {num_heads} heads of width {width}"
    major = torch.cuda.get_device_properties(x.device).major
    if major < 8:
        return f"it takes GPUs of compute capability 8.0 and higher, not {major}"
    return why_not_correct(x.device, x.shape[1], num_heads, width)


def normalized(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    matrices: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_heads: int,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`sasa_det.ops.stem_attention.normalized_stem_attention` does.

    Args:
        query, key: (C, C_in).
        matrices: (16, C, C_in), those of the values of each place.
        x, rel_rows, rel_cols, weight, bias, num_heads, eps: as there.
    """
    with autocast_disabled(x.device):
        image = x.detach().float()
        logits = combine(query.float(), key.float(), rel_rows, rel_cols, num_heads)
        values = matrices.float().transpose(1, 2).contiguous()
        output, mean, variance = _Normalized.apply(
            image, *logits, values, weight.float(), bias.float(), eps
        )
        return output.to(x.dtype), mean, variance


def combine(
    query: Tensor, key: Tensor, rel_rows: Tensor | None, rel_cols: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``bilinear``, ``rel_rows`` and ``rel_cols`` of :class:`StemInputs`.

    Args:
        query, key: (C, C_in).
        rel_rows, rel_cols: (num_heads, width / 2, 7), or None.
        num_heads: number of heads.
    """
    queries = _LOG2_E * query.unflatten(0, (num_heads, -1))
    bilinear = queries.transpose(1, 2) @ key.unflatten(0, (num_heads, -1))
    if rel_rows is None or rel_cols is None:
        zeros = query.new_zeros(num_heads, _OFFSETS, query.shape[1])
        return bilinear, zeros, zeros
    halves = queries.chunk(2, 1)
    pairs = zip((rel_rows, rel_cols), halves, strict=True)
    return bilinear, *((x.float().transpose(1, 2) @ half).contiguous() for x, half in pairs)


def why_not_correct(
    device: torch.device, in_channels: int, num_heads: int, width: int
) -> str | None:
    """Return what is wrong with the results for a small image, or None; computed once.

    ``SASA_DET_SELF_CHECK=0`` leaves it out.
    """
    # A graph that is captured here takes no other work.
    if os.environ.get(CHECK_VARIABLE) == "0" or torch.cuda.is_current_stream_capturing():
        return None
    return _problem(device, in_channels, num_heads, width)


@functools.cache
def _problem(device: torch.device, in_channels: int, num_heads: int, width: int) -> str | None:
    try:
        errors = errors_of(device, in_channels, num_heads, width)
    except CompilerError as error:
        problem = str(error)
    else:
        worst = max(errors, key=errors.get)
        if errors[worst] <= TOLERANCE:
            return None
        error = f"{errors[worst]:.2g} of its largest value"
        problem = f"{worst} differs from PyTorch's by {error}"
    logger.warning("The attention stem does not use its CUDA kernels: %s.", problem.rstrip("."))
    return problem


def errors_of(
    device: torch.device, in_channels: int, num_heads: int, width: int
) -> dict[str, float]:
    """Compare the kernels' results with PyTorch's in float64 for a small image.

    Returns:
        dict[str, float]: the largest error of output and gradients, of the largest value or of 1.
    """
    channels = num_heads * width
    random = torch.Generator().manual_seed(0)
    shapes = {
        "image": (2, in_channels, 9, 11),
        "query": (channels, in_channels),
        "key": (channels, in_channels),
        "value": (4, channels, in_channels),
        "mixing": (4, SIDE, SIDE),
        "rel_rows": (num_heads, width // 2, _OFFSETS),
        "rel_cols": (num_heads, width // 2, _OFFSETS),
        "weight": (channels,),
        "bias": (channels,),
    }
    drawn = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    grad = torch.randn(2, channels, 3, 3, generator=random).to(device)
    eps, results = 1e-5, []
    with torch.enable_grad(), autocast_disabled(device):
        for dtype in (torch.float32, torch.float64):
            tensors = {name: x.to(device, dtype).requires_grad_() for name, x in drawn.items()}
            image, query, key, value, mixing, *rest = tensors.values()
            if dtype == torch.float32:
                matrices = place_matrices(value, mixing)
                output, *_ = normalized(image, query, key, matrices, *rest, num_heads, eps)
            else:
                *embeddings, weight, bias = rest
                projections = (x[..., None, None] for x in (query, key))
                attended = standard_blocks.stem_attention(
                    image, *projections, value, mixing, *embeddings, num_heads
                )
                normed = F.batch_norm(attended, None, None, weight, bias, True, 0.0, eps)
                output = F.relu(F.max_pool2d(normed, SIDE, ceil_mode=True))
            parameters = list(tensors.values())[1:]
            gradients = torch.autograd.grad(output, parameters, grad.to(dtype))
            results.append((output.detach(), *gradients))
    names = ("output", *(f"the gradient of {name}" for name in list(tensors)[1:]))
    errors = {}
    for name, ours, theirs in zip(names, *results, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        errors[name] = float(error.nan_to_num(torch.inf))
    return errors


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, bilinear, rel_rows, rel_cols, values, weight, bias, eps):
        inputs = StemInputs(image, bilinear.contiguous(), rel_rows, rel_cols, values, weight)
        extremes, mean, variance = _extremes(inputs, eps is not None)
        if eps is None:
            factor, scale, shift = None, weight, bias
        else:
            factor = (variance + eps).rsqrt()
            scale = weight * factor
            shift = bias - mean * scale
        output = F.relu(torch.addcmul(shift, extremes, scale))
        ctx.save_for_backward(*vars(inputs).values(), extremes, mean, factor, scale, output)
        ctx.mark_non_differentiable(mean, variance)
        return output.permute(0, 3, 1, 2), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        *tensors, extremes, mean, factor, scale, output = ctx.saved_tensors
        inputs = StemInputs(*tensors)
        grad = torch.where(output > 0, grad.permute(0, 2, 3, 1), 0.0).contiguous()
        grad_bias = grad.sum((0, 1, 2))
        grad_weight = (grad * extremes).sum((0, 1, 2))
        slope, constant = torch.zeros_like(scale), torch.zeros_like(scale)
        if factor is not None:
            grad_weight = (grad_weight - mean * grad_bias) * factor
            pixels = inputs.image.numel() // inputs.image.shape[1]
            slope = -scale * factor * grad_weight / pixels
            constant = -scale * grad_bias / pixels - slope * mean
        gradients = _backward(inputs, grad, scale, slope, constant)
        return None, *gradients, grad_weight, grad_bias, None


def _extremes(inputs: StemInputs, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the extremes (N, rows, cols, C), and mean and variance of all pixels, or nothing."""
    count, rows, cols = inputs.blocks
    grid = _grid(inputs)
    extremes = inputs.image.new_empty(count, rows, cols, inputs.channels)
    of_groups = inputs.image.new_empty(inputs.groups(grid), 3, inputs.channels)
    _start("stem_attention_forward", inputs, grid, extremes=extremes, moments=of_groups)
    if not moments:
        return extremes, inputs.image.new_empty(0), inputs.image.new_empty(0)
    return extremes, *merge_moments(of_groups)


def merge_moments(of_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, (C,), of numbers, means and squared deviations of groups.

    Chan et al., "Algorithms for computing the sample variance", 1983.
    """
    numbers, means, squares = of_groups.double().unbind(1)
    total = numbers.sum(0)
    mean = (numbers * means).sum(0) / total
    variance = (squares + numbers * (means - mean).square()).sum(0) / total
    return mean.float(), variance.float()


def _backward(
    inputs: StemInputs, grad: Tensor, peak: Tensor, slope: Tensor, constant: Tensor
) -> Sequence[Tensor]:
    """Return the gradients of ``bilinear``, ``rel_rows``, ``rel_cols`` and ``values``."""
    in_channels, heads = inputs.image.shape[1], inputs.num_heads
    grid = _grid(inputs)
    groups = inputs.groups(grid)
    grad_values = grad.new_empty(groups, *inputs.values.shape)
    lines = (in_channels + 2 * SIDE) * in_channels
    grad_logits = grad.new_empty(groups, lines, heads, _PIXELS)
    _start(
        *("stem_attention_backward", inputs, grid),
        **{"grad": grad, "peak": peak, "slope": slope, "constant": constant},
        **{"grad_values": grad_values, "grad_logits": grad_logits},
    )
    return *sum_logits(grad_logits.sum(0), in_channels), grad_values.sum(0)


def sum_logits(of_queries: Tensor, in_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``bilinear``, ``rel_rows`` and ``rel_cols`` from those of queries.

    Args:
        of_queries: ((C_in + 8) C_in, num_heads, 16): lines of M, and of the rows and the columns of
            keys, for each query of a block.
        in_channels: C_in.
    """
    sizes = [in_channels**2, SIDE * in_channels, SIDE * in_channels]
    bilinear, *sides = of_queries.split(sizes)
    bilinear = bilinear.sum(2).transpose(0, 1).reshape(-1, in_channels, in_channels)
    gradients = []
    for dim, side in enumerate(sides):
        # (key, C_in, num_heads, query) by row, or by column.
        lines = side.unflatten(0, (SIDE, in_channels)).unflatten(3, (SIDE, SIDE)).sum(4 - dim)
        gradient = lines.new_zeros(lines.shape[2], _OFFSETS, in_channels)
        for query in range(SIDE):
            first = SIDE - 1 - query
            gradient[:, first : first + SIDE] += lines[..., query].permute(2, 0, 1)
        gradients.append(gradient)
    return bilinear, *gradients


def _grid(inputs: StemInputs) -> int:
    count, rows, cols = inputs.blocks
    processors = torch.cuda.get_device_properties(inputs.image.device).multi_processor_count
    needed = -(-count * rows * cols // inputs.groups(1))
    return min(needed, _BLOCKS_OF_PROCESSOR * processors)


def _start(kernel: str, inputs: StemInputs, grid: int, **tensors: Tensor) -> None:
    start = launch_of(kernel, inputs, **tensors)
    with torch.cuda.device_of(inputs.image):
        device = inputs.image.device.index
        function = load_kernel(HEADER, start.name, device, start.shared_bytes)
        stream = torch.cuda.current_stream(device).cuda_stream
        launch(function, (grid, 1, 1), THREADS, start.shared_bytes, start.arguments, stream)
