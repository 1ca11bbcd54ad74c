"""Functions of images that are computed in bands of rows.

Their intermediate results are as large as a window for every pixel, and are there for one band at a
time: autograd keeps the inputs alone, and the backward pass computes every band again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .replay import once

Band = tuple[int, int, int]  # image, first row, row behind the last


@dataclass(frozen=True)
class Bands:
    """A function of images, and how its inputs are cut.

    Attributes:
        function: takes a band of each of its inputs and returns (1, ..., rows, W). It may work in
            place on what it has made itself.
        num_images: the first inputs are (N, ..., H, W).
        num_padded: the next ones are (N, ..., H + 2 reach, W + 2 reach); their bands overlap. The
            rest are parameters, which are not cut.
        reach: rows of padding on each side.
        rows: of a band, at most.
    """

    function: Callable[..., Tensor]
    num_images: int
    num_padded: int
    reach: int
    rows: int

    def map(self, *inputs: Tensor) -> Tensor:
        """Return the function of whole images, (N, ..., H, W)."""
        return _Map.apply(self, *inputs)

    def moments(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of every channel of the function, (C,) of float64."""
        return _Moments.apply(self, *inputs)

    def places(self, inputs: Sequence[Tensor]) -> Iterator[Band]:
        """Yield the bands of inputs of at least one image."""
        padding = 0 if self.num_images else 2 * self.reach
        height = inputs[0].shape[-2] - padding
        for image in range(inputs[0].shape[0]):
            for top in range(0, height, self.rows):
                yield image, top, min(top + self.rows, height)

    def cut(self, inputs: Sequence[Tensor | None], band: Band) -> list[Tensor | None]:
        """Return the views of the inputs that a band needs."""
        image, top, bottom = band
        views = []
        for number, x in enumerate(inputs):
            if x is not None and number < self.num_images + self.num_padded:
                overlap = 0 if number < self.num_images else 2 * self.reach
                x = x[image : image + 1, ..., top : bottom + overlap, :]
            views.append(x)
        return views

    def backward(
        self,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        grad_of: Callable[[Band, Tensor], Tensor],
    ) -> list[Tensor | None]:
        """Return the gradients of the inputs that need one.

        Args:
            grad_of: the gradient of the function's output, from a band and that output.
        """
        gradients = [
            torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True)
        ]
        for band in self.places(inputs):
            pieces = zip(self.cut(inputs, band), needs, strict=True)
            pieces = [x.detach().requires_grad_(need) for x, need in pieces]
            with torch.enable_grad():
                output = self.function(*pieces)
            wanted = [x for x in pieces if x.requires_grad]
            grads = torch.autograd.grad(output, wanted, grad_of(band, output.detach()))
            # Nothing but the results outlives its band.
            del output, pieces, wanted
            targets = [x for x in self.cut(gradients, band) if x is not None]
            for target, grad in zip(targets, grads, strict=True):
                target += grad
        return gradients


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bands: Bands, *inputs: Tensor) -> Tensor:
        ctx.bands = bands
        ctx.save_for_backward(*inputs)
        return once(lambda: _map(bands, inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        def grad_of(band: Band, _: Tensor) -> Tensor:
            image, top, bottom = band
            return grad[image : image + 1, ..., top:bottom, :]

        return None, *ctx.bands.backward(ctx.saved_tensors, ctx.needs_input_grad[1:], grad_of)


def _map(bands: Bands, inputs: Sequence[Tensor]) -> Tensor:
    output = None
    for image, top, bottom in bands.places(inputs):
        piece = bands.function(*bands.cut(inputs, (image, top, bottom)))
        if output is None:
            height = inputs[0].shape[-2] - (0 if bands.num_images else 2 * bands.reach)
            shape = (inputs[0].shape[0], *piece.shape[1:-2], height, piece.shape[-1])
            output = piece.new_empty(shape)
        output[image : image + 1, ..., top:bottom, :] = piece
    return output


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bands: Bands, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, var, count = once(lambda: _moments(bands, inputs), count=3)
        ctx.bands, ctx.count = bands, int(count)
        ctx.save_for_backward(mean, *inputs)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, *inputs = ctx.saved_tensors

        def grad_of(_: Band, output: Tensor) -> Tensor:
            shape = (1, -1, *[1] * (output.ndim - 2))
            slope = 2 * grad_var / ctx.count
            start = grad_mean / ctx.count - slope * mean
            slope, start = (x.to(output.dtype).view(shape) for x in (slope, start))
            return torch.addcmul(start, slope, output)

        return None, *ctx.bands.backward(inputs, ctx.needs_input_grad[1:], grad_of)


def _moments(bands: Bands, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance, and of how many values of a channel they are."""
    count, mean, squares = 0, 0.0, 0.0
    for band in bands.places(inputs):
        values = _by_channel(bands.function(*bands.cut(inputs, band)))
        mean_of_band = values.mean(1, keepdim=True)
        squares_of_band = (values - mean_of_band).square_().sum(1).double()
        # Chan et al., "Algorithms for computing the sample variance", 1983.
        new, difference = values.shape[1], mean_of_band.squeeze(1).double() - mean
        mean = mean + difference * (new / (count + new))
        squares = squares + squares_of_band + difference**2 * (count * new / (count + new))
        count += new
    return mean, squares / count, torch.tensor(count)


def _by_channel(x: Tensor) -> Tensor:
    """(1, C, ...) to (C, values)."""
    return x.flatten(2).squeeze(0)


class Windows(torch.autograd.Function):
    """The windows of one padded image, (1, C, H + k - 1, W + k - 1), as a view (C, k, k, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: int) -> Tensor:
        ctx.kernel_size, ctx.size = kernel_size, x.shape[2:]
        height, width = (side - kernel_size + 1 for side in x.shape[2:])
        _, channel, row, col = x.stride()
        shape = (x.shape[1], kernel_size, kernel_size, height, width)
        return x.as_strided(shape, (channel, row, col, row, col))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        columns = grad.reshape(1, grad.shape[:3].numel(), grad.shape[3:].numel())
        return torch.nn.functional.fold(columns, ctx.size, ctx.kernel_size), None
