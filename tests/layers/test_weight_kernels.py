"""The C++ kernels of vector attention's weights, for every instruction set, beside PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.layers import PairwiseAttention2d, PatchwiseAttention2d
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
    return torch.randn(shape)


def windows(x, kernel_size):
    """(N, C, H, W) to (N, C, k^2, pixels) of the windows that fit."""
    return F.unfold(x, kernel_size).unflatten(1, (x.shape[1], -1))


def assert_close(actual, expected):
    for ours, exact in zip(actual, expected, strict=True):
        size = max(1.0, float(exact.detach().abs().max()))
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=0, atol=1e-5 * size)


def pairwise(n, channels, hidden, groups, height, width, kernel_size):
    torch.manual_seed(0)
    reach = kernel_size - 1
    return (
        randn(n, channels, height, width),
        randn(n, channels, height + reach, width + reach),
        randn(hidden, channels) * channels**-0.5,
        randn(hidden),
        randn(groups, hidden) * hidden**-0.5,
        randn(groups),
    )


def pairwise_hidden(own, other, matrix, kernel_size):
    relation = (own.flatten(2).unsqueeze(2) + windows(other, kernel_size)).relu()
    return torch.einsum("rc,nckp->nrkp", matrix, relation)


def check_pairwise(sizes, instructions):
    tensors = pairwise(*sizes)
    own, other, matrix, shift, next_matrix, bias = tensors
    kernel_size = sizes[-1]
    exact = [x.double().requires_grad_() for x in tensors]
    hidden = pairwise_hidden(*exact[:3], kernel_size)
    logits = torch.einsum(
        "gr,nrkp->ngkp", exact[4], (hidden + exact[3][:, None, None]).relu()
    ) + exact[5].view(-1, 1, 1)
    expected = logits.softmax(2).unflatten(3, own.shape[2:])
    options = (kernel_size, instructions)
    weights = OPS.pairwise_weights(*tensors, *options)
    grad = torch.randn_like(weights)
    gradients = torch.autograd.grad(expected, exact, grad.double(), retain_graph=True)
    found = OPS.pairwise_weights_backward(grad, weights, *tensors[:5], *options)
    assert_close([weights, *found], [expected, *gradients])

    sums = exact[0].flatten(2).unsqueeze(2) + windows(exact[1], kernel_size)
    dims = (0, 2, 3)
    channels = own.shape[1]
    for rectified in (False, True):
        values = sums.relu() if rectified else sums
        moments = OPS.pairwise_moments(own, other, rectified, *options)
        assert moments[0].dtype == moments[1].dtype == torch.float64
        mean = values.mean(dims)
        centered = (values - mean.view(-1, 1, 1)).transpose(0, 1).flatten(1)
        covariance = centered @ centered.T / centered.shape[1]
        assert_close(moments, [mean, covariance if rectified else covariance.diag()])
        start, slope = randn(channels), randn(channels)
        by_channel = slope.diag()
        if rectified:
            slope = randn(channels, channels)
            slope = by_channel = slope + slope.T
        grad = start.view(-1, 1, 1) + torch.einsum("dc,nckp->ndkp", by_channel.double(), values)
        gradients = torch.autograd.grad(values, exact[:2], grad.detach(), retain_graph=True)
        found = OPS.pairwise_moments_backward(start, slope, own, other, rectified, *options)
        assert_close(found, gradients)


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("sizes", PAIRWISE_SIZES)
def test_pairwise(sizes, instructions):
    check_pairwise(sizes, instructions)


def check_patchwise(sizes, instructions):
    n, channels, groups, height, width, kernel_size = sizes
    torch.manual_seed(0)
    columns = channels * kernel_size**2
    reach = kernel_size - 1
    tensors = [randn(n, channels, height + reach, width + reach), randn(columns), randn(columns)]
    tensors.append(randn(groups, columns) * columns**-0.5)
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
@given(st.tuples(st.integers(1, 2), small, small, small, small, st.integers(1, 60)), reach)
def test_any_pairwise_shape(sizes, reach):
    check_pairwise((*sizes, 2 * reach + 1), "")


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 2), small, small, small, st.integers(1, 60)), reach)
def test_any_patchwise_shape(sizes, reach):
    check_patchwise((*sizes, 2 * reach + 1), "")


def test_the_covariance_of_values_far_from_zero():
    own, other, matrix, *_ = pairwise(1, 4, 3, 1, 20, 30, 7)
    own += 1000
    exact = pairwise_hidden(own.double(), other.double(), matrix.double(), 7).flatten(2)[0]
    mean, covariance = OPS.pairwise_moments(own, other, True, 7, "")
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
    mean, covariance = PairwiseMoments.apply(own, other, scale, 0 * scale, 7)
    var = (matrix.double() @ covariance * matrix).sum(1)
    torch.testing.assert_close(var, exact.var(1, correction=0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_windows(bad):
    own, other, *others = pairwise(1, 3, 4, 2, 20, 60, 7)
    window = torch.zeros(20, 60, dtype=torch.bool)
    window[2:9, 44:51] = True
    other[0, 1, 8, 50] = bad
    weights = OPS.pairwise_weights(own, other, *others, 7, "")
    assert torch.equal(~weights[0].isfinite().flatten(0, 1).all(0), window)
    values = torch.ones(3 * 49)
    hidden = OPS.patchwise_hidden(other, values, values, torch.ones(5, 3 * 49), 7, "")
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
