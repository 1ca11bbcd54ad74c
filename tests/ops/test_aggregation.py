"""Aggregation with shared weights: its definition, its borders, its memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_det.ops import aggregate
from sasa_det.ops.aggregation import reflect


def bounce(index, size):
    """Walk back at the ends of a side until the index is inside."""
    while size > 1 and not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index if size > 1 else 0


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("size", [(4, 5), (1, 3), (2, 2)])
def test_equals_a_literal_loop(kernel_size, size):
    torch.manual_seed(0)
    height, width = size
    value = torch.randn(2, 6, height, width, dtype=torch.float64)
    weights = torch.randn(2, 3, kernel_size**2, height, width, dtype=torch.float64)
    expected = torch.zeros_like(value)
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, value.shape)).tolist():
        for row in range(kernel_size):
            for col in range(kernel_size):
                there = (bounce(h + row - kernel_size // 2, height),
                         bounce(w + col - kernel_size // 2, width))  # fmt: skip
                weight = weights[n, c % 3, row * kernel_size + col, h, w]
                expected[n, c, h, w] += weight * value[(n, c, *there)]
    actual = aggregate(value, weights, kernel_size=kernel_size)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_borders_are_reflected():
    image = torch.tensor([[0.0, 1, 2], [3, 4, 5]])[None, None]
    even, odd = [2.0, 1, 0, 1, 2, 1, 0], [5.0, 4, 3, 4, 5, 4, 3]
    expected = torch.tensor([even, odd, even, odd, even, odd])
    assert torch.equal(reflect(image, 2)[0, 0], expected)
    # PyTorch's own, where a side is longer than the padding.
    assert torch.equal(reflect(image, 1)[0, 0], expected[1:5, 1:6])
    assert torch.equal(reflect(torch.full((1, 1, 1, 1), 7.0), 3), torch.full((1, 1, 7, 7), 7.0))


def test_gradients():
    torch.manual_seed(0)
    value = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 2, 9, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: aggregate(*x, kernel_size=3), (value, weights))


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the tensors have that operators make."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return output


def test_the_window_is_not_unfolded():
    value = torch.randn(1, 32, 12, 12, requires_grad=True)
    weights = torch.randn(1, 4, 49, 12, 12, requires_grad=True)
    with LargestTensor() as largest:
        aggregate(value, weights, kernel_size=7).sum().backward()
    assert 0 < largest.elements <= weights.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_float32(dtype):
    # Added one after the other in half precision, the small terms would be lost.
    value = torch.full((1, 8, 9, 9), 2.0**-11, dtype=dtype)
    value[..., 4, 4] = 1
    weights = torch.ones(1, 1, 81, 9, 9, dtype=dtype)
    output = aggregate(value, weights, kernel_size=9)
    assert output.dtype == dtype
    expected = torch.tensor(1 + 80 * 2.0**-11).to(dtype)
    assert torch.equal(output[..., 4, 4], expected.expand(1, 8))


@pytest.mark.parametrize(
    "shape,kernel_size,message",
    [
        ((1, 2, 9, 4, 4), 4, "kernel_size must be odd and at least 1, got 4"),
        ((1, 4, 9, 4, 4), 3, "g a divisor of the 6 channels of value, got"),
        ((1, 18, 4, 4), 3, "weights must be of shape .N, g, .*got .1, 18, 4, 4."),
        ((1, 2, 25, 4, 4), 3, r"weights must be of shape .1, 2, 9, 4, 4. .*got .1, 2, 25, 4, 4."),
    ],
)
def test_bad_values_are_named(shape, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        aggregate(torch.zeros(1, 6, 4, 4), torch.zeros(shape), kernel_size=kernel_size)
