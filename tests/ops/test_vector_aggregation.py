"""The operators of vector attention: their kernels, gradients, registrations and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.ops import aggregate, cpu, vector_aggregation, window_product
from sasa_det.ops.aggregation import reflect
from tests.ops.test_aggregation import LargestTensor

SIZES = [(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (5, 9), (7, 33), (66, 20)]
kernels = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))


def make(n, shared, groups, height, width, kernel_size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = (n, shared * groups, height, width)
    shapes = [(n, groups, kernel_size**2, height, width), image, image]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_autograd(weight, value, grad, kernel_size):
    """Return the output and both gradients of the reference, which is held to a literal loop."""
    tensors = [x.double().requires_grad_() for x in (weight, value)]
    output = aggregate(tensors[1], tensors[0], kernel_size=kernel_size)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad.double())]


@kernels
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("shared,groups,kernel_size", [(8, 2, 7), (15, 1, 3), (1, 5, 1), (2, 3, 9)])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_the_reference(size, shared, groups, kernel_size, instructions):
    weight, value, grad = make(2, shared, groups, *size, kernel_size, torch.float32)
    ops = torch.ops.sasa_det_cpu
    options = (groups, kernel_size, instructions)
    actual = [
        ops.vector_aggregation(weight, value, kernel_size, instructions),
        *ops.vector_aggregation_backward(grad, weight, value, *options),
    ]
    expected = by_autograd(weight, value, grad, kernel_size)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    alone = ops.vector_aggregation_backward(grad, None, value, *options)
    assert torch.equal(alone[0], actual[1]) and alone[1].numel() == 0
    alone = ops.vector_aggregation_backward(grad, weight, None, *options)
    assert torch.equal(alone[1], actual[2]) and alone[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 20)])
def test_types(dtype, size):
    weight, value, grad = make(2, 4, 2, *size, 7, dtype)
    expected = by_autograd(weight, value, grad, 7)
    weight.requires_grad_(), value.requires_grad_()
    output = vector_aggregation(weight, value, 7)
    output.backward(grad)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-2)
    for ours, exact in zip((output, weight.grad, value.grad), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=10 * tolerance)


@kernels
@settings(max_examples=30, deadline=None)
@given(
    shared=st.integers(1, 19),
    groups=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    reach=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shared, groups, height, width, reach, seed):
    kernel_size = 2 * reach + 1
    weight, value, grad = make(
        1, shared, groups, height, width, kernel_size, torch.float32, seed=seed
    )
    expected = by_autograd(weight, value, grad, kernel_size)
    weight.requires_grad_(), value.requires_grad_()
    output = vector_aggregation(weight, value, kernel_size)
    output.backward(grad)
    for ours, exact in zip((output, weight.grad, value.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 5)])
def test_window_product_equals_a_literal_loop(size):
    query, key = (torch.randn(2, 3, *size, dtype=torch.float64) for _ in range(2))
    padded = reflect(key, 1)
    expected = torch.zeros(2, 9, *size, dtype=torch.float64)
    for n, place, row, col in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        neighbour = padded[n, :, row + place // 3, col + place % 3]
        expected[n, place, row, col] = query[n, :, row, col] @ neighbour
    torch.testing.assert_close(window_product(query, key, 3), expected)
    narrow = window_product(query.float(), key.float(), 3)
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients():
    weight, value, _ = make(2, 2, 2, 3, 2, 3)
    weight.requires_grad_(), value.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: vector_aggregation(*x, 3), (weight, value))
    query = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn_like(query, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: window_product(*x, 5), (query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_as_pytorch_wants_it(dtype):
    weight, value, _ = make(1, 2, 2, 3, 5, 3, dtype)
    weight.requires_grad_(), value.requires_grad_()
    torch.library.opcheck(torch.ops.sasa_det.vector_aggregation.default, (weight, value, 3))
    query, key = value, torch.randn_like(value, requires_grad=True)
    torch.library.opcheck(torch.ops.sasa_det.window_product.default, (query, key, 3))
    weight, value, query, key = (x.detach() for x in (weight, value, query, key))
    backward = torch.ops.sasa_det.vector_aggregation_backward.default
    torch.library.opcheck(backward, (torch.randn_like(value), weight, value, 3))
    backward, grad = torch.ops.sasa_det.window_product_backward.default, weight[:, 0]
    torch.library.opcheck(backward, (grad, query, key, 3))


def test_compiled():
    weight, value, grad = make(1, 4, 2, 6, 5, 3, torch.float32)
    expected = by_autograd(weight, value, grad, 3)
    weight.requires_grad_(), value.requires_grad_()
    compiled = torch.compile(vector_aggregation, backend="aot_eager", fullgraph=True)
    output = compiled(weight, value, 3)
    output.backward(grad)
    for ours, exact in zip((output, weight.grad, value.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_what_is_not_finite_stays_in_its_windows(instructions, bad):
    ops = torch.ops.sasa_det_cpu
    weight, value, grad = make(1, 3, 1, 20, 37, 7, torch.float32)
    window = torch.zeros(20, 37, dtype=torch.bool)
    window[7:14, 17:24] = True
    value[0, 1, 10, 20] = bad
    output = ops.vector_aggregation(weight, value, 7, instructions)
    assert torch.equal(~output[0, 1].isfinite(), window)
    assert output[0, ::2].isfinite().all()
    grad_weight, grad_value = ops.vector_aggregation_backward(
        grad, weight, value, 1, 7, instructions
    )
    assert torch.equal(~grad_weight[0, 0].isfinite().all(0), window)
    assert grad_value.isfinite().all()
    # A gradient, and the last weight of a row, next to which another row lies in memory.
    value[0, 1, 10, 20], grad[0, 1, 10, 20], weight[0, 0, 24, 5, 36] = 0, bad, bad
    grad_weight, grad_value = ops.vector_aggregation_backward(
        grad, weight, value, 1, 7, instructions
    )
    window[5, 36] = True
    assert torch.equal(~grad_value[0, 1].isfinite(), window)
    alone = torch.zeros(20, 37, dtype=torch.bool)
    alone[10, 20] = True
    assert torch.equal(~grad_weight[0, 0].isfinite().all(0), alone)


def test_nothing_of_the_size_of_all_windows():
    weight, value, grad = make(1, 8, 4, 12, 12, 7, torch.float32)
    for dtype in (torch.float32, torch.float64):
        tensors = [x.to(dtype).requires_grad_() for x in (weight, value)]
        with LargestTensor() as largest:
            vector_aggregation(*tensors, 7).backward(grad.to(dtype))
        assert 0 < largest.elements <= weight.numel()


@pytest.mark.parametrize(
    "shape,kernel_size,message",
    [
        ((1, 2, 9, 4, 4), 4, "kernel_size must be odd and at least 1, got 4"),
        ((1, 4, 9, 4, 4), 3, "g a divisor of the 6 channels of value, got"),
        ((1, 2, 25, 4, 4), 3, r"weights must be of shape .1, 2, 9, 4, 4. .*got .1, 2, 25, 4, 4."),
    ],
)
def test_bad_values_are_named(shape, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        vector_aggregation(torch.zeros(shape), torch.zeros(1, 6, 4, 4), kernel_size)


def test_bad_products_are_named():
    with pytest.raises(ValueError, match=r"query and key must both be .*\(1, 2, 4, 4\).*1, 3, 4"):
        window_product(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), 3)
