"""The check of the stem's CUDA kernels before their first use on a GPU.

Their results for a small image are compared with PyTorch's in float64, in the same process. If they
differ, or a kernel does not compile, a warning says so and PyTorch's operators are used.
"""

import functools

import torch
import torch.nn.functional as F

from . import standard_blocks
from .blocks import STEM_BLOCK, place_matrices
from .cuda_check import draw, first_use_problem, largest_errors, problem_of
from .precision import autocast_disabled
from .stem_cuda import normalized
from .stem_kernels import OFFSETS

TOLERANCE = 1e-3  # of the largest value of each result, or of 1


def why_not_correct(
    device: torch.device, in_channels: int, num_heads: int, width: int
) -> str | None:
    """Return what is wrong with the results for a small image, or None; computed once.

    Args:
        device: a GPU.
        in_channels: of the image.
        num_heads, width: heads, and channels of each.

    ``SASA_DET_SELF_CHECK=0`` leaves it out.
    """
    key = ("stem", device, in_channels, num_heads, width)
    return problem_of(key, lambda: _problem(device, in_channels, num_heads, width))


def _problem(device: torch.device, in_channels: int, num_heads: int, width: int) -> str | None:
    errors = functools.partial(errors_of, device, in_channels, num_heads, width)
    return first_use_problem("The attention stem", errors, TOLERANCE, "PyTorch's")


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
        "mixing": (4, STEM_BLOCK, STEM_BLOCK),
        "rel_rows": (num_heads, width // 2, OFFSETS),
        "rel_cols": (num_heads, width // 2, OFFSETS),
        "weight": (channels,),
        "bias": (channels,),
    }
    drawn = {name: draw(shape, random) for name, shape in shapes.items()}
    grad = draw((2, channels, 3, 3), random).to(device)
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
                output = F.relu(F.max_pool2d(normed, STEM_BLOCK, ceil_mode=True))
            parameters = list(tensors.values())[1:]
            gradients = torch.autograd.grad(output, parameters, grad.to(dtype))
            results.append((output.detach(), *gradients))
    names = ("output", *(f"the gradient of {name}" for name in list(tensors)[1:]))
    return largest_errors(names, *results)
