"""The C++ kernels of max pools, for every instruction set, beside PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

OPS = torch.ops.sasa_det_cpu
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 33), (4, 32), (5, 7), (6, 70), (33, 31)]
COUNTS = [(3, 5, 1), (3, 64, 17), (1, 3, 512), (2, 4, 515), (4, 1, 16), (3, 2, 1100)]


def check_pool(size, instructions):
    """Compare a map without ties, where the gradient has one place to go."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size).requires_grad_()
    expected = F.max_pool2d(x, 2, ceil_mode=True)
    grad = torch.randn_like(expected)
    (of_x,) = torch.autograd.grad(expected, x, grad)
    x = x.detach()
    torch.testing.assert_close(OPS.max_pool(x, instructions), expected.detach(), rtol=0, atol=0)
    found = OPS.max_pool_backward(grad, x, instructions)
    torch.testing.assert_close(found, of_x, rtol=0, atol=0)


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("size", SIZES)
def test_max_pool(size, instructions):
    check_pool(size, instructions)


side = st.integers(1, 80)


@settings(max_examples=30, deadline=None)
@given(side, side)
def test_a_pool_of_any_size(height, width):
    check_pool((height, width), "")


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("size", SIZES)
def test_one_of_pixels_that_share_a_maximum_gets_its_gradient(size, instructions):
    torch.manual_seed(0)
    x = torch.randint(0, 2, (2, 3, *size)).float()
    pooled = OPS.max_pool(x, instructions)
    assert torch.equal(pooled, F.max_pool2d(x, 2, ceil_mode=True))
    grad = torch.rand_like(pooled) + 1
    found = OPS.max_pool_backward(grad, x, instructions)
    height, width = size
    for y in range(pooled.shape[2]):
        for col in range(pooled.shape[3]):
            rows, cols = (
                slice(2 * y, min(2 * y + 2, height)),
                slice(2 * col, min(2 * col + 2, width)),
            )
            here, values = (t[:, :, rows, cols].flatten(2) for t in (found, x))
            assert torch.all((here != 0).sum(2) == 1)
            assert torch.equal(here.sum(2), grad[:, :, y, col])
            taken = values.gather(2, here.argmax(2, keepdim=True)).squeeze(2)
            assert torch.equal(taken, pooled[:, :, y, col])


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("width", [5, 70])
def test_a_pool_of_numbers_that_are_none(width, instructions):
    x = torch.full((1, 4, 5, width), float("-inf"))
    for place, (y, col) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        x[0, place, y::2, col::2] = float("nan")
    expected = F.max_pool2d(x, 2, ceil_mode=True)
    pooled = OPS.max_pool(x, instructions)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    # No gradient is lost, even where there is none but infinities.
    found = OPS.max_pool_backward(torch.ones_like(pooled), x, instructions)
    assert found.sum() == pooled.numel()
    assert torch.all(
        (found != 0)
        <= (x.isnan() | (F.interpolate(pooled, scale_factor=2)[:, :, :5, :width] == float("-inf")))
    )


def check_pointwise(counts, instructions):
    in_channels, channels, pixels = counts
    torch.manual_seed(0)
    tensors = [
        torch.randn(in_channels, 4, pixels),
        torch.randn(channels, in_channels),
        torch.randn(channels),
    ]
    x, matrix, shift = (t.double().requires_grad_() for t in tensors)
    products = torch.einsum("oc,csp->osp", matrix, x)
    expected = (products.amax(1) + shift[:, None]).relu()
    grad = torch.randn(channels, pixels)
    exact = torch.autograd.grad(expected, (matrix, shift, x), grad.double())
    found = OPS.pointwise_max(*tensors, instructions)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    gradients = OPS.pointwise_max_backward(grad, *tensors, True, instructions)
    for actual, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(actual.double(), other, rtol=1e-4, atol=1e-4)
    *some, of_x = OPS.pointwise_max_backward(grad, *tensors, False, instructions)
    assert of_x is None
    for actual, other in zip(some, gradients, strict=False):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("counts", COUNTS)
def test_pointwise_max(counts, instructions):
    check_pointwise(counts, instructions)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 1200))
def test_a_pointwise_max_of_any_size(in_channels, channels, pixels):
    check_pointwise((in_channels, channels, pixels), "")


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_one_of_products_that_share_a_maximum_gets_its_gradient(instructions):
    torch.manual_seed(0)
    x = torch.randint(0, 2, (3, 4, 600)).float()
    matrix, shift = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]), torch.tensor([0.5, 1.5])
    grad = torch.ones(2, 600)
    of_matrix, of_shift, of_x = OPS.pointwise_max_backward(
        grad, x, matrix, shift, True, instructions
    )
    products = torch.einsum("oc,csp->osp", matrix, x)
    places = products.max(1).values[:, None] == products
    assert places.sum(1).max() == 4
    assert torch.equal(of_shift, torch.full((2,), 600.0))
    # The gradient of x is a row of the matrix for each channel, at one of its maxima.
    assert torch.equal(of_x.sum(1), matrix.sum(0)[:, None].expand(3, 600))
    for pixel in range(600):
        first, second = of_x[0, :, pixel].nonzero(), of_x[2, :, pixel].nonzero()
        assert first.numel() == second.numel() == 1
        assert places[0, first, pixel].all() and places[1, second, pixel].all()


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_products_that_are_no_numbers(instructions):
    x = torch.ones(1, 4, 20)
    x[0, 2, 3] = float("nan")
    tensors = (x, torch.ones(2, 1), torch.tensor([-2.0, 1.0]))
    found = OPS.pointwise_max(*tensors, instructions)
    expected = torch.tensor([[0.0], [2.0]]).repeat(1, 20)
    expected[:, 3] = float("nan")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    of_matrix, *_ = OPS.pointwise_max_backward(torch.ones(2, 20), *tensors, False, instructions)
    assert of_matrix.isnan().all()


def test_shapes_that_do_not_fit():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\)"):
        OPS.max_pool(x[0], "")
    with pytest.raises(ValueError, match=r"grad must be \[1, 2, 2, 2\], got \[1, 2, 4, 4\]"):
        OPS.max_pool_backward(x, x, "")
    with pytest.raises(ValueError, match=r"x must be \(C_in, 4, pixels\)"):
        OPS.pointwise_max(x[0, :, :3], torch.zeros(1, 2), torch.zeros(1), "")
    with pytest.raises(ValueError, match=r"matrix must be \(C, 2\)"):
        OPS.pointwise_max(x[0], torch.zeros(1, 3), torch.zeros(1), "")
    with pytest.raises(ValueError, match=r"grad must be \[1, 4\]"):
        OPS.pointwise_max_backward(
            torch.zeros(1, 5), x[0], torch.zeros(1, 2), torch.zeros(1), True, ""
        )


def test_maps_without_pixels():
    for shape, pooled in [((0, 3, 4, 4), (0, 3, 2, 2)), ((1, 2, 0, 4), (1, 2, 0, 2))]:
        x = torch.zeros(shape)
        assert OPS.max_pool(x, "").shape == pooled
        assert OPS.max_pool_backward(torch.zeros(pooled), x, "").shape == shape
