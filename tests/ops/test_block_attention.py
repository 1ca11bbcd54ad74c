"""The stem's operations against the loops they stand for."""

import itertools

import pytest
import torch

from sasa_det.ops import block_attention, mixed_values


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def literal_block_attention(query, key, value, embedding, block_size, num_heads):
    n, channels, height, width = query.shape
    d = channels // num_heads
    output = torch.zeros_like(value)
    pixels = itertools.product(range(n), range(num_heads), range(height), range(width))
    for b, h, i, j in pixels:
        head = slice(h * d, (h + 1) * d)
        top, left = i // block_size * block_size, j // block_size * block_size
        p = (i - top) * block_size + j - left
        logits, values = [], []
        for a in range(top, min(top + block_size, height)):
            for c in range(left, min(left + block_size, width)):
                q = (a - top) * block_size + c - left
                key_and_embedding = key[b, head, a, c] + embedding[h, p, q]
                logits.append(query[b, head, i, j] @ key_and_embedding)
                values.append(value[b, head, a, c])
        weights = torch.stack(logits).softmax(0)
        output[b, head, i, j] = (weights[:, None] * torch.stack(values)).sum(0)
    return output


@pytest.mark.parametrize("height,width", [(1, 1), (4, 8), (5, 7), (2, 13)])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_block_attention_equals_a_literal_loop(height, width, block_size):
    query, key, value = (randn(2, 8, height, width, seed=s) for s in range(3))
    embedding = randn(2, block_size**2, block_size**2, 4)
    actual = block_attention(query, key, value, embedding, block_size=block_size, num_heads=2)
    expected = literal_block_attention(query, key, value, embedding, block_size, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_block_attention_of_many_blocks_equals_that_of_each():
    # More blocks than one span of the implementation, so that spans are put together.
    query, key, value = (randn(1, 4, 60, 60, seed=s) for s in range(3))
    embedding = randn(1, 4, 4, 4)
    options = {"block_size": 2, "num_heads": 1}
    actual = block_attention(query, key, value, embedding, **options)
    for row, col in ((0, 0), (30, 16), (58, 58)):
        block = (..., slice(row, row + 2), slice(col, col + 2))
        alone = block_attention(query[block], key[block], value[block], embedding, **options)
        torch.testing.assert_close(actual[block], alone)


def test_mixed_values_equal_a_literal_loop():
    x, weight, mixing = randn(2, 3, 5, 9), randn(4, 6, 3), randn(4, 4, 4)
    expected = torch.zeros(2, 6, 5, 9, dtype=torch.float64)
    for i, j in itertools.product(range(5), range(9)):
        matrix = sum(mixing[m, i % 4, j % 4] * weight[m] for m in range(4))
        expected[:, :, i, j] = x[:, :, i, j] @ matrix.T
    torch.testing.assert_close(mixed_values(x, weight, mixing), expected)


@pytest.mark.parametrize("height,width", [(3, 6), (4, 5)])
def test_gradients_are_those_of_finite_differences(height, width):
    inputs = [randn(1, 4, height, width, seed=s).requires_grad_() for s in range(3)]
    inputs.append(randn(2, 9, 9, 2).requires_grad_())
    options = {"block_size": 3, "num_heads": 2}
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, **options), inputs)
    inputs = [randn(1, 2, height, width), randn(3, 4, 2), randn(3, 3, 3)]
    assert torch.autograd.gradcheck(mixed_values, [x.requires_grad_() for x in inputs])


def test_operators_pass_opcheck():
    inputs = [randn(1, 4, 5, 6, seed=s).float().requires_grad_() for s in range(3)]
    inputs.append(randn(2, 4, 4, 2).float().requires_grad_())
    torch.library.opcheck(torch.ops.sasa_det.block_attention.default, (*inputs, 2, 2))
    inputs = [randn(1, 2, 5, 6), randn(3, 4, 2), randn(3, 2, 2)]
    inputs = [x.float().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.sasa_det.mixed_values.default, inputs)


def test_autocast_does_not_reach_inside():
    inputs = [randn(1, 8, 5, 6, seed=s).float().requires_grad_() for s in range(3)]
    inputs.append(randn(2, 4, 4, 4).float().requires_grad_())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = block_attention(*inputs, block_size=2, num_heads=2)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_type_of_their_tensor():
    query, key, value = (randn(1, 4, 4, 4, seed=s) for s in range(3))
    inputs = [query.bfloat16(), key.bfloat16(), value.float(), randn(1, 4, 4, 4).float()]
    inputs = [x.requires_grad_() for x in inputs]
    output = block_attention(*inputs, block_size=2, num_heads=1)
    grads = torch.autograd.grad(output.sum(), inputs)
    assert [x.dtype for x in grads] == [x.dtype for x in inputs]


def test_without_embedding():
    query, key, value = (randn(1, 4, 5, 4, seed=s).requires_grad_() for s in range(3))
    options = {"block_size": 2, "num_heads": 2}
    zero = torch.zeros(2, 4, 4, 2, dtype=torch.float64)
    expected = block_attention(query, key, value, zero, **options)
    actual = block_attention(query, key, value, None, **options)
    torch.testing.assert_close(actual, expected)
    inputs = (query, key, value)
    assert torch.autograd.gradcheck(lambda *x: block_attention(*x, None, **options), inputs)
