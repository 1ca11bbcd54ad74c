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
    normalized_stem_attention,
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
    expected = with_gradients(lambda *x: composed(*x, 2), inputs, grad, torch.float64)
    ops = torch.ops.sasa_det_cpu
    tensors = kernel_tensors(inputs)
    output = ops.stem_attention(*tensors, 2, instructions)
    grads = ops.stem_attention_backward(grad, *tensors, 2, True, instructions)
    grad_x, grad_query, grad_key, grad_value, *grad_embeddings = grads
    actual = [output, grad_x, grad_query[..., None, None], grad_key[..., None, None]]
    actual += [grad_value.sum(0, keepdim=True)]
    assert_close(actual + (grad_embeddings if relative else []), expected, 1e-5)


def kernel_tensors(inputs):
    """What the kernels take: a value matrix for each place, and no gradients."""
    x, query, key, value, _, rel_rows, rel_cols = (
        None if t is None else t.detach() for t in inputs
    )
    matrices = value.expand(16, -1, -1)
    return x, query.flatten(1), key.flatten(1), matrices, rel_rows, rel_cols


@needs_kernels
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_threads_give_the_same_bits(instructions):
    inputs, grad = make(2, 2, 8, 50, 33, 0)
    tensors, norm = kernel_tensors(inputs), (torch.linspace(-1, 1, 16), torch.linspace(0, 1, 16))
    ops = torch.ops.sasa_det_cpu
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            normalized = ops.stem_attention_normalized(*tensors, *norm, 2, 1e-5, instructions)
            results.append(
                [
                    ops.stem_attention(*tensors, 2, instructions),
                    *ops.stem_attention_backward(grad, *tensors, 2, True, instructions),
                    *normalized,
                    *ops.stem_attention_normalized_backward(
                        grad[:, :, :13, :9],
                        *tensors,
                        *norm,
                        *normalized[1:],
                        2,
                        1e-5,
                        True,
                        instructions,
                    ),
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
    tensors = kernel_tensors(inputs)
    actual = torch.ops.sasa_det_cpu.stem_attention(*tensors, 2, instructions, scale, shift)
    assert_close([actual], [expected], 1e-5)


def composed_norm(*tensors, heads, eps):
    """The norm, which has weight and bias as its last arguments, of the composed operators."""
    *tensors, weight, bias = tensors
    output = composed(*tensors, heads)
    if eps is None:
        return output * weight[:, None, None] + bias[:, None, None]
    return F.batch_norm(output, None, None, weight, bias, True, 0.0, eps)


def pool(x):
    return F.max_pool2d(F.relu(x), 4, ceil_mode=True)


def decided(normalized, weight):
    """Mark the maxima of (N, C, H, W) that rounding can neither move nor bring to zero.

    Of a channel whose weight is zero all places are equal, and the first is to be taken.
    """
    n, channels, height, width = normalized.shape
    x = F.pad(normalized, (0, -width % 4, 0, -height % 4), value=-1e9)
    blocks = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).transpose(3, 4).flatten(4)
    first, second = blocks.topk(2, -1).values.unbind(-1)
    clear = (first - second > 1e-4) | (weight == 0)[:, None, None]
    return (first < -1e-4) | (first > 1e-4) & clear


def norm_of(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, channels, generator=generator)
    weight[0] = 0
    return weight.requires_grad_(), bias.requires_grad_()


def expect_normalized(inputs, heads, eps, grad):
    """Return the output and all gradients in float64, and the gradient where all is decided."""
    inputs = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    normalized = composed_norm(*inputs, heads=heads, eps=eps)
    grad = grad * decided(normalized.detach(), inputs[-2].detach())
    present = [x for x in inputs if x is not None]
    output = pool(normalized)
    return [output, *torch.autograd.grad(output, present, grad.double())], grad


@needs_kernels
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from([2, 4, 6, 16]),
    st.integers(2, 40),
    st.integers(2, 80),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([None, 1e-5, 0.1]),
    st.integers(0, 2**31),
)
def test_normalized_equals_what_it_fuses(
    n, heads, head_width, height, width, mixtures, relative, eps, seed
):
    inputs, grad = make(n, heads, head_width, height, width, mixtures, relative, seed)
    inputs += norm_of(heads * head_width, seed)
    grad = grad[:, :, : -(-height // 4), : -(-width // 4)]
    expected, grad = expect_normalized(inputs, heads, eps, grad)
    actual = with_gradients(
        lambda *x: normalized_stem_attention(*x, num_heads=heads, eps=eps)[0], inputs, grad
    )
    assert_close(actual, expected, 3e-5)


@needs_kernels
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("head_width", [6, 16])
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_every_instruction_set_normalizes(instructions, head_width, eps):
    inputs, grad = make(2, 2, head_width, 21, 70, 0)
    norm = norm_of(2 * head_width)
    expected, grad = expect_normalized([*inputs, *norm], 2, eps, grad[:, :, :6, :18])
    tensors, norm = kernel_tensors(inputs), [x.detach() for x in norm]
    ops = torch.ops.sasa_det_cpu
    output, *saved = ops.stem_attention_normalized(*tensors, *norm, 2, eps, instructions)
    grad_x, grad_query, grad_key, grad_value, *others = ops.stem_attention_normalized_backward(
        grad, *tensors, *norm, *saved, 2, eps, True, instructions
    )
    actual = [output, grad_x, grad_query[..., None, None], grad_key[..., None, None]]
    assert_close([*actual, grad_value.sum(0, keepdim=True), *others], expected, 1e-5)


@needs_kernels
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_the_first_of_equal_places_gets_the_gradient(instructions):
    """Queries of zero attend to all places alike, and give every place the same output."""
    inputs, grad = make(1, 1, 4, 7, 10, 0, relative=False)
    with torch.no_grad():
        inputs[1].zero_()
    grad, norm = grad[:, :, :2, :3], (torch.ones(4), torch.full((4,), 9.0))
    tensors = kernel_tensors(inputs)
    ops = torch.ops.sasa_det_cpu
    _, *saved = ops.stem_attention_normalized(*tensors, *norm, 1, None, instructions)
    actual = ops.stem_attention_normalized_backward(
        grad, *tensors, *norm, *saved, 1, None, False, instructions
    )[1]
    x, _, key, value, *_ = (None if t is None else t.detach().double() for t in inputs)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            pixels = x[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1)
            keys, values = key.flatten(1) @ pixels, value[0] @ pixels
            grad_weights = grad[0, :, i, j].double() @ values
            grad_logits = (grad_weights - grad_weights.mean()) / pixels.shape[1]
            expected += torch.outer(keys @ grad_logits, pixels[:, 0])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("instructions", cpu.instruction_sets())
def test_statistics_of_a_large_mean_beside_a_small_variance(instructions):
    """As exact as from the map itself, in double precision."""
    inputs, _ = make(2, 2, 16, 70, 90, 0)
    x, query, key, value, rel_rows, rel_cols = kernel_tensors(inputs)
    x = 1000 + 0.1 * x
    x[:, :, 35:] += 0.5
    tensors = (x, query / 1000, key, value, rel_rows, rel_cols)
    ops, norm = torch.ops.sasa_det_cpu, (torch.linspace(-1, 1, 32), torch.zeros(32))
    _, _, mean, variance = ops.stem_attention_normalized(*tensors, *norm, 2, 1e-5, instructions)
    output = ops.stem_attention(*tensors, 2, instructions).double()
    assert (output.mean((0, 2, 3)).abs() > 1000 * output.std((0, 2, 3))).any()
    torch.testing.assert_close(mean.double(), output.mean((0, 2, 3)), rtol=1e-6, atol=0)
    exact = output.var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-5, atol=0)


@needs_kernels
def test_training_saves_nothing_of_the_size_of_its_map():
    inputs, _ = make(2, 2, 8, 21, 34)
    inputs += norm_of(16)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normalized_stem_attention(*inputs, num_heads=2, eps=1e-5)
    extremes, statistics = 4 * 2 * 16 * 6 * 9, 4 * 2 * 16
    assert sum(saved.values()) == sum(x.nbytes for x in inputs) + extremes + statistics


@needs_kernels
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_normalized_bfloat16_computes_in_float32(eps):
    inputs, grad = make(1, 2, 8, 9, 14)
    inputs = [x.bfloat16() for x in [*inputs, *norm_of(16)]]
    expected, grad = expect_normalized(inputs, 2, eps, grad[:, :, :3, :4])
    actual = with_gradients(
        lambda *x: normalized_stem_attention(*x, num_heads=2, eps=eps)[0],
        inputs,
        grad,
        torch.bfloat16,
    )
    assert all(x.dtype == torch.bfloat16 for x in actual)
    assert_close(actual, expected, 1e-2)


@needs_kernels
def test_a_gradient_of_a_gradient_is_refused():
    inputs, _ = make(1, 2, 4, 8, 8)
    output = normalized_stem_attention(*inputs, *norm_of(8), num_heads=2, eps=1e-5)[0]
    (grad,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|no backward|autograd"):
        grad.sum().backward()


@needs_kernels
def test_an_image_without_pixels_has_no_norm():
    inputs, _ = make(0, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="x must have pixels"):
        normalized_stem_attention(*inputs, *norm_of(8), num_heads=2, eps=1e-5)


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
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("mixtures,relative", [(3, True), (0, False)])
def test_normalized_operator_passes_opcheck(mixtures, relative, eps):
    inputs, _ = make(2, 2, 4, 5, 6, mixtures, relative)
    arguments = (*inputs, *norm_of(8), 2, eps)
    torch.library.opcheck(torch.ops.sasa_det.stem_attention_normalized.default, arguments)


@needs_kernels
@pytest.mark.parametrize("normalized", [True, False])
def test_an_image_without_gradient_gets_none(normalized):
    inputs, grad = make(1, 2, 4, 6, 7)
    if normalized:
        inputs, grad = [*inputs, *norm_of(8)], grad[:, :, :2, :2]

    def run(*inputs):
        if normalized:
            return normalized_stem_attention(*inputs, num_heads=2, eps=1e-5)[0]
        return stem_attention(*inputs, block_size=4, num_heads=2)

    expected = with_gradients(run, inputs, grad)
    x = inputs[0].detach()
    grads = torch.autograd.grad(run(x, *inputs[1:]), inputs[1:], grad)
    assert x.grad is None
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[2:], strict=True))


@pytest.mark.parametrize("mixtures,relative", [(3, True), (0, True), (3, False)])
def test_flops_are_those_of_the_operators_it_fuses(mixtures, relative):
    inputs, _ = make(2, 2, 4, 8, 12, mixtures, relative)
    functions = [
        lambda *x: composed(*x, 2),
        lambda *x: stem_attention(*x, block_size=4, num_heads=2),
    ]
    if BUILT:
        norm = norm_of(8)
        functions.append(lambda *x: normalized_stem_attention(*x, *norm, num_heads=2, eps=1e-5)[0])
    counts = []
    for function in functions:
        counter = FlopCounterMode(display=False)
        with counter:
            function(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1 and counts[0] > 0
