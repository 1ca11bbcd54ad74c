"""The stem's fused operator against the operators it fuses, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.ops import (
    block_attention,
    cpu,
    mixed_values,
    pooled_stem_attention,
    relative_embedding,
    stem_attention,
)

BUILT = not cpu.MISSING
needs_kernels = pytest.mark.skipif(not BUILT, reason=str(cpu.MISSING))


def make(n, heads, head_width, height, width, mixtures=3, relative=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = heads * head_width

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    # Logits of a few units: far larger ones have rounding errors of their own.
    inputs = [randn(n, 3, height, width), randn(channels, 3, 1, 1) / 3, randn(channels, 3, 1, 1)]
    inputs += [randn(max(mixtures, 1), channels, 3)]
    inputs += [randn(mixtures, 4, 4).softmax(0) if mixtures else None]
    inputs += [randn(heads, head_width // 2, 7) if relative else None for _ in range(2)]
    grad = randn(n, channels, height, width)
    return [None if x is None else x.requires_grad_() for x in inputs], grad


def composed(x, query, key, value, mixing, rel_rows, rel_cols, heads):
    if mixing is None:
        values = F.conv2d(x, value[0, :, :, None, None])
    else:
        values = mixed_values(x, value, mixing)
    embedding = relative_embedding(rel_rows, rel_cols, 4)
    return block_attention(
        F.conv2d(x, query), F.conv2d(x, key), values, embedding, block_size=4, num_heads=heads
    )


def with_gradients(function, inputs, grad, dtype=torch.float32):
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    output = function(*inputs)
    present = [x for x in inputs if x is not None]
    return [output, *torch.autograd.grad(output, present, grad.to(output.dtype))]


def assert_close(actual, expected, tolerance):
    for i, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == exact.shape
        if exact.numel():
            exact = exact.detach()
            error = (ours.detach().double() - exact).abs().max()
            assert error <= tolerance * max(1.0, float(exact.abs().max())), i


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6, 16]),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_equals_the_operators_it_fuses(
    n, heads, head_width, height, width, mixtures, relative, seed
):
    inputs, grad = make(n, heads, head_width, height, width, mixtures, relative, seed)

    def fused(*inputs):
        return stem_attention(*inputs, block_size=4, num_heads=heads)

    expected = with_gradients(lambda *x: composed(*x, heads), inputs, grad, torch.float64)
    assert_close(with_gradients(fused, inputs, grad), expected, 1e-5)
    assert_close(with_gradients(fused, inputs, grad, torch.float64), expected, 1e-12)


@needs_kernels
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_every_instruction_set_equals_the_operators_it_fuses(instructions, relative):
    inputs, grad = make(2, 2, 6, 21, 18, 0, relative)
    x, query, key, value, _, rel_rows, rel_cols = inputs
    expected = with_gradients(lambda *x: composed(*x, 2), inputs, grad, torch.float64)
    ops = torch.ops.sasa_det_cpu
    matrices = value.detach().expand(16, -1, -1)
    tensors = (x, query.flatten(1), key.flatten(1), matrices, rel_rows, rel_cols)
    tensors = [None if t is None else t.detach() for t in tensors]
    output = ops.stem_attention(*tensors, 2, instructions)
    grads = ops.stem_attention_backward(grad, *tensors, 2, True, instructions)
    grad_x, grad_query, grad_key, grad_value, *grad_embeddings = grads
    actual = [output, grad_x, grad_query[..., None, None], grad_key[..., None, None]]
    actual += [grad_value.sum(0, keepdim=True)]
    assert_close(actual + (grad_embeddings if relative else []), expected, 1e-5)


@needs_kernels
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_threads_give_the_same_bits(instructions):
    inputs, grad = make(2, 2, 8, 50, 33, 0)
    x, query, key, value, _, rel_rows, rel_cols = (
        None if t is None else t.detach() for t in inputs
    )
    tensors = (x, query.flatten(1), key.flatten(1), value.expand(16, -1, -1), rel_rows, rel_cols)
    ops = torch.ops.sasa_det_cpu
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    ops.stem_attention(*tensors, 2, instructions),
                    *ops.stem_attention_backward(grad, *tensors, 2, True, instructions),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("instructions", cpu.instruction_sets())
@pytest.mark.parametrize("height,width", [(1, 1), (9, 14), (40, 7)])
def test_pooling_equals_what_it_fuses(height, width, instructions):
    inputs, _ = make(2, 2, 6, height, width, 0)
    tensors = [None if x is None else x.detach() for x in inputs]
    scale, shift = torch.linspace(-2, 2, 12), torch.linspace(1, -1, 12)
    output = composed(*(None if x is None else x.double() for x in tensors), 2)
    output = F.relu(output * scale[:, None, None] + shift[:, None, None])
    expected = F.max_pool2d(output, 4, ceil_mode=True)
    x, query, key, value, _, rel_rows, rel_cols = tensors
    matrices = value.expand(16, -1, -1)
    tensors = (x, query.flatten(1), key.flatten(1), matrices, rel_rows, rel_cols)
    actual = torch.ops.sasa_det_cpu.stem_attention(*tensors, 2, instructions, scale, shift)
    assert_close([actual], [expected], 1e-5)


@needs_kernels
def test_pooling_lets_a_nan_through():
    inputs, _ = make(1, 1, 4, 8, 12)
    inputs[0].data[0, 1, 5, 6] = float("nan")
    tensors = [x.detach() for x in inputs]
    output = pooled_stem_attention(
        *tensors, torch.ones(4), torch.zeros(4), block_size=4, num_heads=1
    )
    spoiled = torch.zeros(2, 3, dtype=torch.bool)
    spoiled[1, 1] = True
    assert torch.equal(output.isnan().all(1)[0], spoiled)
    assert torch.equal(output.isnan().any(1)[0], spoiled)


@needs_kernels
@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(1, 4, 8, 8)}, r"x must be \(N, C_in, H, W\) and query"),
        ({"key": torch.zeros(8, 2, 1, 1)}, "key must have query's shape"),
        ({"value": torch.zeros(1, 6, 3)}, r"value must be \(16, 8, 3\)"),
        ({"num_heads": 3}, "channels 8 must be a multiple of num_heads 3"),
        ({"num_heads": 0}, "channels 8 must be a multiple of num_heads 0"),
        ({"rel_rows": None}, "rel_rows and rel_cols must be given together"),
        ({"rel_rows": torch.zeros(2, 2, 5)}, "rel_rows and rel_cols must be"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    inputs, _ = make(1, 2, 4, 8, 8, 0)
    names = ("x", "query", "key", "value", "mixing", "rel_rows", "rel_cols")
    arguments = dict(zip(names, inputs, strict=True), num_heads=2, block_size=4)
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        stem_attention(**arguments)


@needs_kernels
def test_bfloat16_accumulates_in_float32():
    inputs, grad = make(1, 2, 8, 9, 14)
    inputs = [x.bfloat16() for x in inputs]
    expected = with_gradients(lambda *x: composed(*x, 2), inputs, grad, torch.float64)
    actual = with_gradients(
        lambda *x: stem_attention(*x, block_size=4, num_heads=2), inputs, grad, torch.bfloat16
    )
    assert all(x.dtype == torch.bfloat16 for x in actual)
    assert_close(actual, expected, 1e-2)


@needs_kernels
@pytest.mark.parametrize("mixtures,relative", [(3, True), (0, False)])
def test_operator_passes_opcheck(mixtures, relative):
    inputs, _ = make(2, 2, 4, 5, 6, mixtures, relative)
    torch.library.opcheck(torch.ops.sasa_det.stem_attention.default, (*inputs, 2))
    inputs = [None if x is None else x.detach() for x in inputs]
    affine = (torch.ones(8), torch.zeros(8))
    torch.library.opcheck(torch.ops.sasa_det.stem_attention_pooled.default, (*inputs, *affine, 2))


@needs_kernels
def test_an_image_without_gradient_gets_none():
    inputs, grad = make(1, 2, 4, 6, 7)
    expected = with_gradients(
        lambda *x: stem_attention(*x, block_size=4, num_heads=2), inputs, grad
    )
    x = inputs[0].detach()
    output = stem_attention(x, *inputs[1:], block_size=4, num_heads=2)
    grads = torch.autograd.grad(output, inputs[1:], grad)
    assert x.grad is None
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:], strict=True))


@pytest.mark.parametrize("mixtures,relative", [(3, True), (0, True), (3, False)])
def test_flops_are_those_of_the_operators_it_fuses(mixtures, relative):
    inputs, _ = make(2, 2, 4, 8, 12, mixtures, relative)
    counts = []
    for function in (
        lambda *x: composed(*x, 2),
        lambda *x: stem_attention(*x, block_size=4, num_heads=2),
    ):
        counter = FlopCounterMode(display=False)
        with counter:
            function(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
