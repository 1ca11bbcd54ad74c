"""Functions that keep next to nothing for the backward pass, which runs them again.

A second run need not repeat all of the first. What is small beside the maps, or takes long to find,
is kept by :func:`once`, whose second call returns what the first one did: statistics of norms, and
what attention has summed up. Running statistics take note of the first run alone.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.precision import autocast_disabled

Results = Tensor | tuple[Tensor, ...]

_DIFFERENT = "The backward pass did not run a function as the forward pass did."


class _Record:
    """What a run found, in the order in which it asked for it."""

    def __init__(self, kept: Sequence[Tensor] | None = None):
        self.is_replayed = kept is not None
        self.kept = list(kept or ())
        self.position = 0

    def end(self) -> None:
        """Check that all was asked for."""
        if self.position < len(self.kept):
            raise RuntimeError(_DIFFERENT)

    def take(self) -> Tensor:
        if self.position == len(self.kept):
            raise RuntimeError(_DIFFERENT)
        self.position += 1
        # A tensor of its own, since autograd writes to it whose result it is.
        return self.kept[self.position - 1].detach()


_of_thread = threading.local()


def _current() -> _Record | None:
    return getattr(_of_thread, "record", None)


@contextmanager
def _use(record: _Record | None) -> Iterator[None]:
    before, _of_thread.record = _current(), record
    try:
        yield
    finally:
        _of_thread.record = before


def is_replaying() -> bool:
    """Tell whether a function is run again, by the backward pass of :func:`replayed`."""
    record = _current()
    return record is not None and record.is_replayed


def once(compute: Callable[[], Results], count: int = 1) -> Results:
    """Return what a function returns, or, while it is run again, what it returned before.

    Args:
        compute: returns results that have no gradients: it is called by the forward pass of an
            ``autograd.Function``, or without gradients.
        count: number of its results; 1 for a tensor, more for a tuple of as many.
    """
    record = _current()
    if record is None:
        return compute()
    if record.is_replayed:
        results = tuple(record.take() for _ in range(count))
        return results if count > 1 else results[0]
    with _use(None):  # what it is made of need not be kept
        results = compute()
    record.kept += results if count > 1 else [results]
    return results


def gradients(
    function: Callable[..., Results],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Callable[[Results], Results] | Results,
    parameters: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """Run a function with gradients, and return those of its arguments and parameters.

    Args:
        function: of the tensors.
        tensors: its arguments.
        needs: which of them need gradients.
        grad: the gradient of the function's results, or how it comes from them.
        parameters: what the function takes besides, all in need of gradients.
    """
    pieces = [
        x if x is None else x.detach().requires_grad_(need)
        for x, need in zip(tensors, needs, strict=True)
    ]
    with torch.enable_grad():
        results = function(*pieces)
    wanted = [x for x, need in zip(pieces, needs, strict=True) if need]
    if callable(grad):
        grad = grad(results)
    found = iter(torch.autograd.grad(results, [*wanted, *parameters], grad, allow_unused=True))
    return [next(found) if need else None for need in needs] + list(found)


def computed_again(function: Callable[..., Results], count: int = 1) -> Callable[..., Results]:
    """Let a function of tensors and others keep its arguments alone; see :func:`once`.

    Args:
        function: depends on its arguments alone, and changes nothing.
        count: number of its results.
    """

    @functools.wraps(function)
    def wrapped(*arguments):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        # What is left for the backward pass must not hold tensors that autograd cannot release.
        others = [None if isinstance(x, Tensor) else x for x in arguments]

        def run(*tensors: Tensor) -> Results:
            rest = iter(tensors)
            return function(*(next(rest) if x is None else x for x in others))

        return _Again.apply(run, count, *tensors)

    return wrapped


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: Callable[..., Results], count: int, *tensors: Tensor) -> Results:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return once(lambda: run(*tensors), count)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = gradients(ctx.run, ctx.saved_tensors, ctx.needs_input_grad[2:], grads)
        return None, None, *found


def replayed(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: Callable[[], list[Tensor]]
) -> Tensor:
    """Return ``function(x)``; the backward pass runs the function again.

    It keeps ``x`` and what :func:`once` keeps.

    Args:
        function: of a tensor, outside of autocast, without random numbers. What it changes, it
            changes in :func:`sasa_det.layers.norm.update_running_statistics`.
        x: any tensor.
        parameters: returns all leaves of autograd that the function takes. They have no hooks,
            which would see their gradients twice.
    """
    return _Replayed.apply(function, parameters, x, *parameters())


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, list_parameters, x: Tensor, *parameters: Tensor) -> Tensor:
        record = _Record()
        with _use(record):
            output = function(x)
        ctx.function, ctx.list_parameters, ctx.parameters = function, list_parameters, parameters
        # Parameters are saved so that autograd tells whether they have changed since.
        ctx.save_for_backward(x, *parameters, *record.kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters, (x, *saved) = ctx.parameters, ctx.saved_tensors
        kept = saved[len(parameters) :]
        now = ctx.list_parameters()
        if len(now) != len(parameters) or any(map(operator.is_not, now, parameters)):
            raise RuntimeError("Parameters were replaced between the forward and backward pass.")

        def run(x: Tensor) -> Tensor:
            record = _Record(kept)
            with _use(record), autocast_disabled(x.device):
                output = ctx.function(x)
            record.end()
            return output

        needs = ctx.needs_input_grad
        wanted = [p for p, need in zip(parameters, needs[3:], strict=True) if need]
        grad_x, *found = gradients(run, [x], needs[2:3], grad, wanted)
        rest = iter(found)
        return None, None, grad_x, *(next(rest) if need else None for need in needs[3:])
