"""What the report of a GPU compares beside the kernels of local attention: the project's other
kernels, the levels of a pyramid in one call, and a step in a CUDA graph.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import LocalSelfAttention2d
from ..layers.joined import attend_levels, runs_on_levels
from ..ops import aggregation_cuda, level_norm_cuda, stem_check
from ..ops.cuda_check import judge, largest_errors
from ..ops.gpu_timing import capture
from ..ops.levels import join, split
from .gpu_tables import Comparison

_DTYPE = torch.bfloat16
_CHANNELS, _HEADS = 64, 2
_LEVELS = ((19, 21), (10, 11), (5, 6))
_TOLERANCE = 2e-2  # of bfloat16

Errors = Callable[[], dict[str, float]]


def checks_parts(device: torch.device) -> list[tuple[str, Callable[[], list[Comparison]]]]:
    """Return name and comparison of each piece."""
    checks: dict[str, tuple[Errors, str, float]] = {
        "attention stem": (
            partial(stem_check.errors_of, device, in_channels=3, num_heads=4, width=16),
            "PyTorch in float64",
            stem_check.TOLERANCE,
        )
    }
    for dtype, tolerance in level_norm_cuda.TOLERANCE.items():
        name = f"norms of levels, {str(dtype).removeprefix('torch.')}"
        errors = partial(level_norm_cuda.errors_of, device, dtype)
        checks[name] = (errors, "PyTorch in float64", tolerance)
    for size in (3, 7):
        errors = partial(aggregation_cuda.errors_of, device, size)
        name = f"vector_aggregation, kernel_size {size}"
        checks[name] = (errors, "PyTorch in float64", aggregation_cuda.TOLERANCE)
    each = "one level after the other"
    checks["levels in one call"] = (partial(errors_of_levels, device), each, _TOLERANCE)
    checks["a step in a CUDA graph"] = (partial(errors_of_graph, device), "one outside of it", 0.0)
    return [(name, partial(_compare, name, *check)) for name, check in checks.items()]


def _compare(what: str, errors: Errors, theirs: str, tolerance: float) -> list[Comparison]:
    found = errors()
    problem = judge(found, tolerance, f"that of {theirs}").problem
    return [Comparison(what, theirs, max(found.values()), problem)]


def in_bfloat16(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a module in channels_last; relative embeddings stay float32, as under autocast."""
    module.to(device, _DTYPE, memory_format=torch.channels_last)
    for part in module.modules():
        if isinstance(part, LocalSelfAttention2d):
            for embedding in (part.rel_rows, part.rel_cols):
                embedding.data = embedding.data.float()
    return module


def _layer(device: torch.device) -> LocalSelfAttention2d:
    torch.manual_seed(0)
    return in_bfloat16(LocalSelfAttention2d(_CHANNELS, _CHANNELS, num_heads=_HEADS), device)


def _image(device: torch.device, height: int, width: int) -> Tensor:
    image = torch.randn(2, _CHANNELS, height, width, device=device, dtype=_DTYPE)
    return image.to(memory_format=torch.channels_last).requires_grad_()


def errors_of_levels(device: torch.device) -> dict[str, float]:
    """Compare a layer on three levels at once with the same layer on each.

    Raises:
        RuntimeError: if the layer does not run on levels.
    """
    layer = _layer(device)
    maps = [_image(device, *size) for size in _LEVELS]
    if not all(runs_on_levels(layer, x) for x in maps):
        raise RuntimeError("a layer does not run on all levels at once here")
    leaves = [*maps, *layer.parameters()]
    pixels, sizes = join(maps)
    outputs = [split(attend_levels(layer, pixels, sizes), sizes), [layer(x) for x in maps]]
    grads = [torch.randn_like(x) for x in outputs[1]]
    results = [(*ys, *torch.autograd.grad(ys, leaves, grads)) for ys in map(list, outputs)]
    names = [
        *(f"output {i}" for i in range(len(maps))),
        *(f"the gradient of input {i}" for i in range(len(maps))),
        *(f"the gradient of {name}" for name, _ in layer.named_parameters()),
    ]
    return largest_errors(names, *([x.detach() for x in tensors] for tensors in results))


def errors_of_graph(device: torch.device) -> dict[str, float]:
    """Compare gradients of a layer whose step is replayed with those of one that is not."""
    layer, x = _layer(device), _image(device, *_LEVELS[0])
    grad = torch.randn_like(x)
    kept: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    def make():
        def run():
            kept[:] = step()

        return run

    calls = capture(make, rotate=False)
    calls.graph.replay()
    torch.cuda.synchronize()
    names = [
        "the gradient of the input",
        *(f"that of {name}" for name, _ in layer.named_parameters()),
    ]
    return largest_errors(names, kept, step())
