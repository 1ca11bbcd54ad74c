"""Products and what lies between them, for every instruction set, against float64."""

import pytest
import torch
import torch.nn.functional as F

from sasa_det.ops import cpu
from sasa_det.ops.product import Operand, has_products

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

INSTRUCTION_SETS = cpu.instruction_sets()
# Batch, channels in and out, height, width.
SHAPES = [
    (1, 3, 5, 1, 1),
    (2, 7, 9, 5, 3),
    (3, 64, 64, 4, 4),
    (1, 64, 130, 40, 40),
    (8, 33, 40, 9, 11),
    (2, 16, 24, 20, 20),
    (1, 300, 270, 3, 50),  # several tasks of rows
    (2, 5, 3, 70, 101),  # several parts of the weight's gradient
]
each = pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
ops = torch.ops.sasa_det_cpu


def product(instructions, sources, weights, transposed=False):
    options = ([], False, [], False, [], False)
    return ops.product(sources, weights, transposed, *options, instructions)


def column(x):
    return x.double()[:, None, None]


def multiply(weight, x):
    return torch.einsum("oc,nchw->nohw", weight.double(), x.double())


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.fixture
def maps(shape):
    torch.manual_seed(0)
    n, c, o, h, w = shape
    x, y, other = torch.randn(n, c, h, w), torch.randn(n, o, h, w), torch.randn(n, o, h, w)
    return x, y, other, torch.randn(o, c)


@each
@shapes
def test_products_of_one_map(shape, maps, instructions):
    x, _, _, weight = maps
    second, third = torch.randn(3, x.shape[1]), torch.randn(17, x.shape[1])
    bias = torch.randn(3)
    terms = [None, None, None, None, bias, None, None, None, None]
    found = ops.product(
        *([x], [weight, second, third], False, [], False, terms, False, [], False, instructions)
    )
    assert_close(found[0], multiply(weight, x))
    assert_close(found[1], multiply(second, x) + column(bias))
    assert_close(found[2], multiply(third, x))


@each
@shapes
def test_sums_of_products_with_transposed_weights(shape, maps, instructions):
    x, y, _, weight = maps
    z, second = torch.randn(*y.shape[:1], 6, *y.shape[2:]), torch.randn(6, x.shape[1])
    (found,) = product(instructions, [y, z], [weight, second], transposed=True)
    assert_close(found, multiply(weight.t(), y) + multiply(second.t(), z))


@each
@shapes
def test_what_stands_before_and_behind_a_product(shape, maps, instructions):
    x, y, other, weight = maps
    scale, shift = torch.randn(2, x.shape[1])
    result_scale, result_shift = torch.randn(2, y.shape[1])
    (found,) = ops.product(
        *([x], [weight], False, [scale, shift], True),
        *([result_scale, result_shift, other], True, [], False, instructions),
    )
    inner = multiply(weight, F.relu(x * column(scale) + column(shift)))
    assert_close(found, F.relu(inner * column(result_scale) + column(result_shift) + other))


@each
@shapes
def test_moments(shape, maps, instructions):
    x, _, _, weight = maps
    # Means that are large beside the deviation, as a norm may meet them.
    x = 0.1 * x + 10
    found, mean, var = ops.product(
        *([x], [weight], False, [], False, [], False, [], True, instructions)
    )
    assert_close(found, multiply(weight, x))
    assert_close(mean, found.double().mean((0, 2, 3)), 1e-6)
    assert_close(var, found.double().var((0, 2, 3), unbiased=False), 1e-5)
    mean, var = ops.channel_moments(x, instructions)
    assert_close(mean, x.double().mean((0, 2, 3)), 1e-6)
    assert_close(var, x.double().var((0, 2, 3), unbiased=False), 1e-5)


@each
@shapes
def test_gradient_in_front_of_a_relu(shape, maps, instructions):
    x, y, other, weight = maps
    mask_scale, mask_shift, center = torch.randn(3, y.shape[1])
    found, total, moment = ops.product(
        *([x], [weight], False, [], False, [], False),
        *([other, mask_scale, mask_shift, center], False, instructions),
    )
    kept = other * mask_scale[:, None, None] + mask_shift[:, None, None] > 0
    expected = torch.where(kept, multiply(weight, x), 0.0)
    assert_close(found, expected)
    assert_close(total, expected.sum((0, 2, 3)), 2e-5)
    assert_close(moment, (expected * (other - column(center))).sum((0, 2, 3)), 2e-5)
    (found,) = ops.product(
        *([x], [weight], False, [], False, [], False),
        *([other, None, None, None], False, instructions),
    )
    assert_close(found, torch.where(other > 0, multiply(weight, x), 0.0))


@each
@shapes
def test_gradient_of_a_weight(shape, maps, instructions):
    x, y, other, _ = maps
    scale, shift = torch.randn(2, x.shape[1])
    terms = [*torch.randn(2, y.shape[1]), other, *torch.randn(2, y.shape[1])]
    found = ops.weight_gradient([y], terms, x, [scale, shift], True, instructions)
    grad = y * column(terms[0]) + column(terms[1])
    grad = grad + column(terms[3]) * (other - column(terms[4]))
    inner = F.relu(x * column(scale) + column(shift))
    assert_close(found, torch.einsum("nohw,nchw->oc", grad, inner), 2e-5)
    found = ops.weight_gradient([y], [], x, [], False, instructions)
    assert_close(found, torch.einsum("nohw,nchw->oc", y.double(), x.double()), 2e-5)


@each
@shapes
def test_gradients_of_several_weights(shape, maps, instructions):
    x, y, other, _ = maps
    third = torch.randn(*y.shape[:1], 17, *y.shape[2:])
    found = ops.weight_gradient([y, third, other], [], x, [], False, instructions)
    exact = torch.cat([y, third, other], 1).double()
    assert_close(found, torch.einsum("nohw,nchw->oc", exact, x.double()), 2e-5)


@each
@shapes
def test_sums_and_masks_of_maps(shape, maps, instructions):
    _, y, other, _ = maps
    scale, shift, second_scale, second_shift, center = torch.randn(5, y.shape[1])
    first, second = [scale, shift], [second_scale, second_shift]
    found = ops.add(y, first, other, second, True, instructions)
    expected = y * column(scale) + column(shift)
    expected = expected + other * column(second_scale) + column(second_shift)
    assert_close(found, F.relu(expected))
    found = ops.add(y, first, None, [], False, instructions)
    assert_close(found, y * column(scale) + column(shift))
    output = torch.randn_like(y)
    found, total, *moments = ops.masked_gradient(
        y, output, [other, output], [center, scale], instructions
    )
    expected = torch.where(output > 0, y.double(), 0.0)
    assert torch.equal(found.double(), expected)
    assert_close(total, expected.sum((0, 2, 3)), 2e-5)
    for moment, of, mean in zip(moments, (other, output), (center, scale), strict=True):
        assert_close(moment, (expected * (of - column(mean))).sum((0, 2, 3)), 2e-5)


@each
def test_the_same_bits_for_any_number_of_threads(instructions):
    torch.manual_seed(0)
    x, y, weight = torch.randn(2, 40, 31, 37), torch.randn(2, 50, 31, 37), torch.randn(50, 40)
    results = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        moments = ops.product([x], [weight], False, [], False, [], False, [], True, instructions)
        gradient = ops.weight_gradient([y], [], x, [], False, instructions)
        results.append([*moments, gradient, *ops.channel_moments(x, instructions)])
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batches_and_maps_that_are_not_contiguous():
    weight = torch.randn(4, 6)
    (empty,) = product("", [torch.randn(0, 6, 5, 5)], [weight])
    assert empty.shape == (0, 4, 5, 5)
    assert not ops.weight_gradient([empty], [], torch.randn(0, 6, 5, 5), [], False, "").any()
    x = torch.randn(2, 5, 6, 7).transpose(1, 2).to(memory_format=torch.channels_last)
    (found,) = product("", [x], [weight])
    assert_close(found, multiply(weight, x))
    (found,) = product("", [x], [torch.randn(6, 4).t()])
    assert found.is_contiguous()


@pytest.mark.parametrize(
    "sources,weights,message",
    [
        ([(1, 3, 4, 4)], [(5, 2)], "weight 0 must fit its source's 3 channels"),
        ([(1, 3, 4, 4), (1, 3, 4, 5)], [(5, 3)] * 2, "must differ in their channels alone"),
        ([(1, 3, 4, 4)], [(5, 3)] * 4, "at most 3"),
        ([(3, 4, 4)], [(5, 3)], r"x must be \(N, C, H, W\)"),
    ],
)
def test_errors_name_what_does_not_fit(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        product("", list(map(torch.randn, sources)), list(map(torch.randn, weights)))


def test_types_that_have_no_products():
    assert has_products(torch.zeros(1)) and not has_products(torch.zeros(1, dtype=torch.float64))
    assert not has_products(torch.zeros(1, device="meta"))
    assert Operand(torch.zeros(1)).terms == []
