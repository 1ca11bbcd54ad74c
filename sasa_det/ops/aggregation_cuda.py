"""CUDA kernels of vector aggregation, csrc/cuda/vector_aggregation.cuh."""

import ctypes
import functools

import torch
from torch import Tensor

from . import cuda
from .aggregation import aggregate
from .cuda_check import draw, first_use_problem, largest_errors, problem_of
from .cuda_kernels import Launch
from .precision import autocast_disabled
from .structures import POINTER, structure

HEADER = "vector_aggregation.cuh"
KERNEL_SIZES = (1, 3, 5, 7)
TYPES = {torch.float32: "Float32", torch.bfloat16: "Bfloats", torch.float16: "Floats16"}
STRUCTURE = "AggregationArguments"
TOLERANCE = 1e-4  # of the largest value of each result, or of 1

_THREADS = 256  # as AGGREGATION_THREADS in the kernels' file
_MOST_BLOCKS = 65535  # of a grid's second and third dimension


_Arguments = structure(
    (ctypes.c_int, "height width groups shared"), (POINTER, "weight value grad result")
)


def why_not(x: Tensor, groups: int, kernel_size: int) -> str | None:
    """Return why the kernels do not take images like ``x``, or None."""
    if x.device.type != "cuda":
        return f"they take CUDA tensors, not {x.device.type}"
    if x.dtype not in TYPES:
        return f"they take float32, bfloat16 and float16, not {x.dtype}"
    if kernel_size not in KERNEL_SIZES:
        return f"they take a kernel_size of {KERNEL_SIZES[-1]} at most, not {kernel_size}"
    numbers = max(x.shape[1], groups * kernel_size**2) * x.shape[2:].numel()  # of an image
    if numbers >= 2**31 or max(x.shape[0], groups) > _MOST_BLOCKS:
        return f"they do not take images of {tuple(x.shape)}"
    return cuda.MISSING or cuda.why_not_capable(x.device) or _why_not_correct(x.device, kernel_size)


def forward(weight: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """See :func:`sasa_det.ops.vector_aggregation`."""
    weight, value = _alike(weight, value)
    groups = weight.shape[1]
    output = torch.empty_like(value)
    _start("forward", groups, kernel_size, output, weight=weight, value=value)
    return output


def gradients(
    grad: Tensor, weight: Tensor | None, value: Tensor | None, groups: int, kernel_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and value; without the other one, empty.

    Args:
        grad: (N, C, H, W), of the output.
        weight, value: see :func:`sasa_det.ops.vector_aggregation`; one of them may be None.
        groups: of the weights.
    """
    grad, weight, value = _alike(grad, weight, value)
    grad_weight = grad_value = grad.new_empty(0)
    if value is not None:
        shape = (grad.shape[0], groups, kernel_size**2, *grad.shape[2:])
        grad_weight = grad.new_empty(shape)
        _start("weight", groups, kernel_size, grad_weight, grad=grad, value=value)
    if weight is not None:
        grad_value = torch.empty_like(grad)
        _start("value", groups, kernel_size, grad_value, grad=grad, weight=weight)
    return grad_weight, grad_value


def kernel_name(kernel: str, dtype: torch.dtype, kernel_size: int) -> str:
    """Return a kernel's name with its template arguments: of "forward", "weight" or "value"."""
    return f"vector_aggregation_{kernel}<{TYPES[dtype]}, {kernel_size}>"


def _alike(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors contiguous and of one type: their own, or that of the sums."""
    dtypes = {x.dtype for x in tensors if x is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [None if x is None else x.to(dtype).contiguous() for x in tensors]


def _start(kernel: str, groups: int, kernel_size: int, result: Tensor, **tensors: Tensor) -> None:
    image = tensors["value"] if kernel != "value" else tensors["grad"]
    batch, channels, height, width = image.shape
    if image.numel() == 0:
        result.zero_()
        return
    addresses = {name: x.data_ptr() for name, x in tensors.items()}
    arguments = _Arguments(
        height, width, groups, channels // groups, **addresses, result=result.data_ptr()
    )
    name = kernel_name(kernel, image.dtype, kernel_size)
    grid = (-(-height * width // _THREADS), groups, batch)
    cuda.start(Launch(HEADER, name, grid, 0, arguments, _THREADS), image)


def _why_not_correct(device: torch.device, kernel_size: int) -> str | None:
    key = ("vector_aggregation", device, kernel_size)
    return problem_of(key, lambda: _problem(device, kernel_size))


def _problem(device: torch.device, kernel_size: int) -> str | None:
    errors = functools.partial(errors_of, device, kernel_size)
    return first_use_problem("vector_aggregation", errors, TOLERANCE, "PyTorch's")


def errors_of(device: torch.device, kernel_size: int) -> dict[str, float]:
    """Compare the kernels' results in float32 with PyTorch's in float64 for a small image.

    Returns:
        dict[str, float]: the largest error of output and gradients, of the largest value or of 1.
    """
    groups, shared, size = 3, 9, (5, 11)
    random = torch.Generator().manual_seed(0)
    image = (2, groups * shared, *size)
    shapes = [(2, groups, kernel_size**2, *size), image, image]
    weight, value, grad = (draw(shape, random).to(device) for shape in shapes)
    with torch.enable_grad(), autocast_disabled(device):
        ours = [
            forward(weight, value, kernel_size),
            *gradients(grad, weight, value, groups, kernel_size),
        ]
        exact = [x.double().requires_grad_() for x in (weight, value)]
        output = aggregate(exact[1], exact[0], kernel_size=kernel_size)
        theirs = [output.detach(), *torch.autograd.grad(output, exact, grad.double())]
    names = ("output", "the gradient of weight", "the gradient of value")
    return largest_errors(names, ours, theirs)
