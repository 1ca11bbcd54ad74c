"""The C++ kernels of vector attention's weights, for every instruction set, beside PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.layers import PairwiseAttention2d, PatchwiseAttention2d
from sasa_det.layers.pairwise_form import PairwiseForm
from sasa_det.layers.weight_kernels import PairwiseMoments
from sasa_det.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

OPS = torch.ops.sasa_det_cpu
PAIRWISE_SIZES = [
    (2, 18, 16, 8, 9, 20, 7),  # n, channels, hidden, groups, height, width, kernel_size
    (1, 6, 4, 2, 3, 50, 3),
    (2, 3, 5, 9, 1, 1, 1),
    (1, 34, 32, 16, 17, 49, 3),  # several bands of rows and tiles of columns
    (1, 1, 1, 1, 2, 3, 9),
]
PATCHWISE_SIZES = [
    (2, 3, 8, 9, 20, 7),  # n, channels, groups, height, width, kernel_size
    (1, 4, 2, 3, 50, 3),
    (2, 3, 11, 1, 1, 1),
    (1, 2, 9, 130, 33, 3),  # several bands of rows
]


def randn(*shape):
    """Return multiples of 1/16, whose products have no rounding errors that decide on a ReLU."""
    return exact_in_float(torch.randn(shape))


def exact_in_float(x):
    return (16 * x).round() / 16


def assert_close(actual, expected):
    for ours, exact in zip(actual, expected, strict=True):
        size = float(exact.detach().abs().clamp(min=1).max()) if exact.numel() else 1.0
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=0, atol=1e-4 * size)


# How many of some inputs are multiplied, and how many channels of a relation that makes.
FORMS = {
    "sums": lambda inputs: (0, 0),
    "products": lambda inputs: (inputs, inputs),
    "sum_of_products": lambda inputs: (inputs, 1),
    "products_and_sums": lambda inputs: (inputs // 2, inputs // 2),
    "sums_of_products_and_sums": lambda inputs: (inputs // 4 * 2, inputs // 4),
}


def pairwise(n, inputs, hidden, groups, height, width, kernel_size, form="sums"):
    """Return the number of products, and the tensors that pairwise weights are made of."""
    torch.manual_seed(0)
    reach = kernel_size - 1
    products, product_channels = FORMS[form](inputs)
    channels = product_channels + inputs - products
    return products, (
        randn(n, inputs, height, width),
        randn(n, inputs, height + reach, width + reach),
        randn(product_channels),
        exact_in_float(torch.randn(hidden, channels) * max(channels, 1) ** -0.5),
        randn(hidden),
        exact_in_float(torch.randn(groups, hidden) * hidden**-0.5),
        randn(groups),
    )


def pairwise_values(own, other, product_shift, products, kernel_size):
    """Return what relations are the ReLU of, (N, C, k^2, H, W), place by place."""
    height, width = own.shape[2:]
    places = []
    for row in range(kernel_size):
        for col in range(kernel_size):
            there = other[:, :, row : row + height, col : col + width]
            values = []
            for channel, shift in enumerate(product_shift):
                count = products // len(product_shift)
                of_channel = slice(channel * count, (channel + 1) * count)
                values.append(shift + (own[:, of_channel] * there[:, of_channel]).sum(1))
            values += [own[:, i] + there[:, i] for i in range(products, own.shape[1])]
            places.append(torch.stack(values, 1))
    return torch.stack(places, 2)


def pairwise_hidden(own, other, matrix, kernel_size):
    values = pairwise_values(own, other, matrix[0, :0], 0, kernel_size)
    return torch.einsum("rc,nckhw->nrkhw", matrix, values.relu())


def check_pairwise(sizes, instructions, form="sums"):
    products, tensors = pairwise(*sizes, form)
    kernel_size = sizes[-1]
    exact = [x.double().requires_grad_() for x in tensors]
    values = pairwise_values(*exact[:3], products, kernel_size)
    _, _, _, matrix, shift, next_matrix, bias = exact
    hidden = torch.einsum("rc,nckhw->nrkhw", matrix, values.relu()) + shift.view(-1, 1, 1, 1)
    logits = torch.einsum("gr,nrkhw->ngkhw", next_matrix, hidden.relu()) + bias.view(-1, 1, 1, 1)
    expected = logits.softmax(2)
    options = (kernel_size, instructions)
    weights = OPS.pairwise_weights(*tensors, products, *options)
    grad = torch.randn_like(weights)
    gradients = torch.autograd.grad(
        expected, exact, grad.double(), retain_graph=True, materialize_grads=True
    )
    found = OPS.pairwise_weights_backward(grad, weights, *tensors[:-1], products, *options)
    assert_close([weights, *found], [expected, *gradients])

    channels, dims = values.shape[1], (0, 2, 3, 4)
    for rectified in (False, True):
        x = values.relu() if rectified else values
        moments = OPS.pairwise_moments(*tensors[:3], products, rectified, *options)
        assert moments[0].dtype == moments[1].dtype == torch.float64
        mean = x.mean(dims)
        centered = (x - mean.view(-1, 1, 1, 1)).transpose(0, 1).flatten(1)
        covariance = centered @ centered.T / centered.shape[1]
        assert_close(moments, [mean, covariance if rectified else covariance.diag()])
        start, slope = randn(channels), randn(channels)
        by_channel = slope.diag()
        if rectified:
            slope = randn(channels, channels)
            slope = by_channel = slope + slope.T
        grad = start.view(-1, 1, 1, 1) + torch.einsum("dc,nckhw->ndkhw", by_channel.double(), x)
        gradients = torch.autograd.grad(
            x, exact[:3], grad.detach(), retain_graph=True, materialize_grads=True
        )
        found = OPS.pairwise_moments_backward(
            start, slope, *tensors[:3], products, rectified, *options
        )
        assert_close(found, gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("sizes", PAIRWISE_SIZES)
def test_pairwise(sizes, instructions, form):
    check_pairwise(sizes, instructions, form)


@pytest.mark.parametrize("products,product_channels", [(2, 0), (0, 1), (3, 2), (6, 2)])
def test_products_that_make_no_channels(products, product_channels):
    own, other, shift = randn(1, 5, 4, 4), randn(1, 5, 6, 6), randn(product_channels)
    expected = f"a multiple of the {product_channels} numbers of product_shift and at most 5, got"
    with pytest.raises(ValueError, match=f"{expected} {products}"):
        OPS.pairwise_moments(own, other, shift, products, False, 3, "")


def check_patchwise(sizes, instructions):
    n, channels, groups, height, width, kernel_size = sizes
    torch.manual_seed(0)
    columns = channels * kernel_size**2
    reach = kernel_size - 1
    tensors = [randn(n, channels, height + reach, width + reach), randn(columns), randn(columns)]
    tensors.append(exact_in_float(torch.randn(groups, columns) * columns**-0.5))
    exact = [x.double().requires_grad_() for x in tensors]
    key, scale, shift, matrix = exact
    values = F.unfold(key, kernel_size) * scale[:, None] + shift[:, None]
    expected = (matrix @ values.relu()).unflatten(2, (height, width))
    options = (kernel_size, instructions)
    hidden = OPS.patchwise_hidden(*tensors, *options)
    grad = torch.randn_like(hidden)
    found = OPS.patchwise_hidden_backward(grad, *tensors, *options)
    gradients = torch.autograd.grad(expected, exact, grad.double())
    assert_close([hidden, *found], [expected, *gradients])


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("sizes", PATCHWISE_SIZES)
def test_patchwise(sizes, instructions):
    check_patchwise(sizes, instructions)


small, reach = st.integers(1, 20), st.integers(0, 3)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 2), small, small, small, small, st.integers(1, 60)),
    reach,
    st.sampled_from(list(FORMS)),
)
def test_any_pairwise_shape(sizes, reach, form):
    check_pairwise((*sizes, 2 * reach + 1), "", form)


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 2), small, small, small, st.integers(1, 60)), reach)
def test_any_patchwise_shape(sizes, reach):
    check_patchwise((*sizes, 2 * reach + 1), "")


def test_the_covariance_of_values_far_from_zero():
    _, (own, other, no_shift, matrix, *_) = pairwise(1, 4, 3, 1, 20, 30, 7)
    own += 1000
    exact = pairwise_hidden(own.double(), other.double(), matrix.double(), 7).flatten(2)[0]
    mean, covariance = OPS.pairwise_moments(own, other, no_shift, 0, True, 7, "")
    matrix = matrix.double()
    torch.testing.assert_close(matrix @ mean, exact.mean(1), rtol=1e-6, atol=0)
    var = (matrix @ covariance * matrix).sum(1)
    torch.testing.assert_close(var, exact.var(1, correction=0), rtol=1e-3, atol=0)


def test_the_variance_of_what_cancels():
    """The relations of four channels are nearly the same, and their differences are taken."""
    torch.manual_seed(0)
    own, other = torch.randn(1, 1, 40, 100), torch.randn(1, 1, 46, 106)
    scale = torch.ones(4)
    own, other = (x + 0.01 * torch.randn(1, 4, *x.shape[2:]) for x in (own, other))
    matrix = torch.tensor([[1.0, -1, 1, -1]])
    exact = pairwise_hidden(own.double(), other.double(), matrix.double(), 7).flatten(2)[0]
    mean, covariance = PairwiseMoments.apply(own, other, scale, 0 * scale, PairwiseForm(7))
    var = (matrix.double() @ covariance * matrix).sum(1)
    torch.testing.assert_close(var, exact.var(1, correction=0), rtol=5e-3, atol=0)


# A product with infinity may be negative, and its ReLU finite.
@pytest.mark.parametrize("bad,form", [(math.inf, "sums"), *((math.nan, form) for form in FORMS)])
def test_what_is_not_finite_stays_in_its_windows(bad, form):
    products, (own, other, *others) = pairwise(1, 4, 4, 2, 20, 60, 7, form)
    window = torch.zeros(20, 60, dtype=torch.bool)
    window[2:9, 44:51] = True
    other[0, 1, 8, 50] = bad
    weights = OPS.pairwise_weights(own, other, *others, products, 7, "")
    assert torch.equal(~weights[0].isfinite().flatten(0, 1).all(0), window)
    values = torch.ones(4 * 49)
    hidden = OPS.patchwise_hidden(other, values, values, torch.ones(5, 4 * 49), 7, "")
    assert torch.equal(~hidden[0].isfinite().all(0), window)


@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
def test_relations_are_not_kept_for_the_backward_pass(kind):
    layer, x = kind(32, 32, relation_channels=16), torch.randn(1, 32, 20, 20, requires_grad=True)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    # The weights, of 4 groups, are the largest. Relations have 18 and 800 channels; nothing of 16
    # channels for every place of a window would fit in beside the weights.
    assert max(kept.values()) == 4 * 49 * 20 * 20 * 4
    assert sum(kept.values()) < 16 * 49 * 20 * 20 * 4
    output.sum().backward()
