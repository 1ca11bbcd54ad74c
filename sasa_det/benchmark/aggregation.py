"""Cases of vector attention's aggregation, beside a convolution of the same width."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..ops import vector_aggregation
from ..ops.aggregation import aggregate
from .measure import Case, Contender, Run, Settings, cases_of_passes
from .operators import CONVOLUTION, module_contender, square_convolution
from .peak import count_flops, of_pass

_KERNEL_SIZE, _CHANNELS, _SHARED = 7, 256, 8


def _as_built(weight: Tensor, value: Tensor) -> Tensor:
    return vector_aggregation(weight, value, _KERNEL_SIZE)


def _in_pytorch(weight: Tensor, value: Tensor) -> Tensor:
    return aggregate(value, weight, kernel_size=_KERNEL_SIZE)


def _weight_shape(settings: Settings, size: int) -> tuple[int, ...]:
    return (settings.batch, _CHANNELS // _SHARED, _KERNEL_SIZE**2, size, size)


def _run(settings: Settings, size: int, training: bool, aggregation: Callable) -> Run:
    weight = torch.randn(
        _weight_shape(settings, size), device=settings.device, dtype=settings.dtype
    )
    value = settings.features(_CHANNELS, size)
    if not training:
        return lambda: aggregation(weight, value)
    weight.requires_grad_(), value.requires_grad_()
    grad = settings.features(_CHANNELS, size)
    return lambda: torch.autograd.grad(aggregation(weight, value), (weight, value), grad)


def _flops(settings: Settings, size: int, training: bool) -> int:
    shapes = _weight_shape(settings, size), (settings.batch, _CHANNELS, size, size)
    return of_pass(count_flops(lambda: _as_built, *shapes), training)


def _contenders(settings: Settings, size: int, training: bool) -> list[Contender]:
    arguments = (settings, size, training)
    run, flops = partial(_run, *arguments), partial(_flops, *arguments)
    build = partial(square_convolution, _CHANNELS)
    return [
        module_contender(settings, CONVOLUTION, build, _CHANNELS, size, training),
        Contender("aggregation", partial(run, _as_built), flops=flops),
        Contender("aggregation in PyTorch", partial(run, _in_pytorch), flops=flops, slow=True),
    ]


def _cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    features = f"{settings.batch}x{_CHANNELS}x{size}x{size}"
    title = f"vector aggregation, {{}}, {features}, k {_KERNEL_SIZE}, {_SHARED} channels a weight"
    contenders = partial(_contenders, settings, size)
    return cases_of_passes("aggregation", "vector aggregation", title, contenders)


CASES: dict[str, Callable[[Settings], list[Case]]] = {"aggregation": _cases}
