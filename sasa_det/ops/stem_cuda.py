"""The stem on a GPU: from the image to each block's extremes, and its gradients.

The kernels take few and small tensors, of which PyTorch makes and differentiates the rest: for each
head a matrix M with q_i . k_j = x_i M x_j, and for each offset a vector whose product with x_i is
q_i . r.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda
from .blocks import STEM_BLOCK
from .exporting import why_not_instead
from .precision import autocast_disabled
from .stem_kernels import (
    HEAD_WIDTHS,
    MOST_CHANNELS,
    MOST_CHANNELS_OF_IMAGE,
    OFFSETS,
    PIXELS,
    StemInputs,
    launch_of,
)

_LOG2_E = math.log2(math.e)
# Blocks of threads for a multiprocessor: each goes through many blocks of the image.
_BLOCKS_OF_PROCESSOR = 4


def why_not(x: Tensor, channels: int, num_heads: int) -> str | None:
    """Return why images like ``x`` cannot run here, or None if they can."""
    if cuda.MISSING:
        return cuda.MISSING
    if x.device.type != "cuda":
        return f"it takes CUDA tensors, not {x.device.type}"
    if reason := why_not_instead(x):
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16, not {x.dtype}"
    if x.requires_grad:
        return "it has no gradient of the image"
    if x.shape[1] > MOST_CHANNELS_OF_IMAGE or x.numel() == 0:
        return f"it does not take images of shape {tuple(x.shape)}"
    width = channels // num_heads
    if width not in HEAD_WIDTHS or max(channels, PIXELS * num_heads) > MOST_CHANNELS:
        return f"it does not take {num_heads} heads of width {width}"
    return cuda.why_not_capable(x.device)


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
    bilinear = _products(queries, key.unflatten(0, (num_heads, -1)))
    if rel_rows is None or rel_cols is None:
        zeros = query.new_zeros(num_heads, OFFSETS, query.shape[1])
        return bilinear, zeros, zeros
    halves = queries.chunk(2, 1)
    pairs = zip((rel_rows, rel_cols), halves, strict=True)
    return bilinear, *(_products(x.float(), half) for x, half in pairs)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sum (heads, width, M) times (heads, width, C_in) over the width, never in TF32."""
    return (a[..., :, None] * b[..., None, :]).sum(1)


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
    results = {"extremes": extremes, "moments": of_groups}
    cuda.start(launch_of("stem_attention_forward", inputs, grid, **results), inputs.image)
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
    lines = (in_channels + 2 * STEM_BLOCK) * in_channels
    grad_logits = grad.new_empty(groups, lines, heads, PIXELS)
    tensors = {"grad": grad, "peak": peak, "slope": slope, "constant": constant}
    results = {"grad_values": grad_values, "grad_logits": grad_logits}
    launch = launch_of("stem_attention_backward", inputs, grid, **tensors, **results)
    cuda.start(launch, inputs.image)
    return *sum_logits(grad_logits.sum(0), in_channels), grad_values.sum(0)


def sum_logits(of_queries: Tensor, in_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``bilinear``, ``rel_rows`` and ``rel_cols`` from those of queries.

    Args:
        of_queries: ((C_in + 8) C_in, num_heads, 16): lines of M, and of the rows and the columns of
            keys, for each query of a block.
        in_channels: C_in.
    """
    sizes = [in_channels**2, STEM_BLOCK * in_channels, STEM_BLOCK * in_channels]
    bilinear, *sides = of_queries.split(sizes)
    bilinear = bilinear.sum(2).transpose(0, 1).reshape(-1, in_channels, in_channels)
    gradients = []
    for dim, side in enumerate(sides):
        # (key, C_in, num_heads, query) by row, or by column.
        lines = (
            side.unflatten(0, (STEM_BLOCK, in_channels))
            .unflatten(3, (STEM_BLOCK, STEM_BLOCK))
            .sum(4 - dim)
        )
        gradient = lines.new_zeros(lines.shape[2], OFFSETS, in_channels)
        for query in range(STEM_BLOCK):
            first = STEM_BLOCK - 1 - query
            gradient[:, first : first + STEM_BLOCK] += lines[..., query].permute(2, 0, 1)
        gradients.append(gradient)
    return bilinear, *gradients


def _grid(inputs: StemInputs) -> int:
    count, rows, cols = inputs.blocks
    processors = torch.cuda.get_device_properties(inputs.image.device).multi_processor_count
    needed = -(-count * rows * cols // inputs.groups(1))
    return min(needed, _BLOCKS_OF_PROCESSOR * processors)
