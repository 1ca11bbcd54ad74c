"""The C++ kernels, for every instruction set that this processor has, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.ops import cpu, local_attention

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

INSTRUCTION_SETS = cpu.instruction_sets()


def run(inputs, grad, kernel_size, num_heads, border="mask", instructions=""):
    """Return the output and the five gradients that the kernels find, without autograd."""
    options = (kernel_size, num_heads, border == "mask", instructions)
    ops = torch.ops.sasa_det_cpu
    return [
        ops.local_attention(*inputs, *options),
        *ops.local_attention_backward(grad, *inputs, *options),
    ]


def expected(inputs, grad, kernel_size, num_heads, border="mask"):
    inputs = [None if x is None else x.double().requires_grad_() for x in inputs]
    output = local_attention(
        *inputs,
        kernel_size=kernel_size,
        num_heads=num_heads,
        border=border,
        content=inputs[1] is not None,
        backend="reference",
    )
    present = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(output, present, grad.double()))
    return [output, *(None if x is None else next(grads) for x in inputs)]


def make(n, heads, head_width, height, width, kernel_size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, heads * head_width, height, width)] * 4
    shapes += [(heads, head_width // 2, kernel_size)] * 2
    query, key, value, grad, rows, cols = (torch.randn(s, generator=generator) for s in shapes)
    query, key, value, grad = (x.to(dtype) for x in (query, key, value, grad))
    return [query, key, value, rows, cols], grad


def assert_equals_reference(actual, expected, tolerance):
    names = ("output", "query", "key", "value", "rel_rows", "rel_cols")
    for name, ours, exact in zip(names, actual, expected, strict=True):
        if exact is None:
            assert ours.numel() == 0, name
            continue
        assert ours.shape == exact.shape, name
        if exact.numel():
            exact = exact.detach()
            error = (ours.detach().double() - exact).abs().max()
            assert error <= tolerance * max(1.0, float(exact.abs().max())), name


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("content,relative", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    "n,heads,head_width,height,width,kernel_size",
    [
        (2, 2, 8, 5, 7, 3),
        (1, 2, 6, 1, 1, 7),
        (1, 1, 2, 3, 50, 7),
        (2, 1, 64, 9, 4, 5),
        (1, 2, 4, 60, 33, 7),  # several bands of rows, several vectors of columns
        (1, 1, 4, 30, 17, 11),
        (1, 1, 4, 25, 18, 1),
        (1, 1, 2, 7, 9, 35),  # a window wider than a vector
    ],
)
def test_equals_the_reference(
    n, heads, head_width, height, width, kernel_size, content, relative, border, instructions
):
    inputs, grad = make(n, heads, head_width, height, width, kernel_size)
    if not content:
        inputs[1] = None
    if not relative:
        inputs[3:] = None, None
    options = (inputs, grad, kernel_size, heads, border)
    assert_equals_reference(run(*options, instructions), expected(*options), 1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from([2, 4, 6, 10, 16, 32]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7, 9, 11]),
    st.sampled_from(["mask", "zero"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(INSTRUCTION_SETS or [""]),
    st.integers(0, 2**31),
)
def test_equals_the_reference_at_random(
    n, heads, head_width, height, width, kernel_size, border, dtype, instructions, seed
):
    inputs, grad = make(n, heads, head_width, height, width, kernel_size, seed, dtype)
    options = (inputs, grad, kernel_size, heads, border)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_equals_reference(run(*options, instructions), expected(*options), tolerance)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([2, 4, 6, 16]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 3, 5, 7, 9, 35]),
    st.sampled_from(["mask", "zero"]),
    st.sampled_from(["all", "no content", "no embeddings"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(INSTRUCTION_SETS or [""]),
    st.integers(0, 2**31),
)
def test_narrow_maps_equal_the_reference_at_random(
    n, heads, head_width, height, width, kernel_size, border, terms, dtype, instructions, seed
):
    inputs, grad = make(n, heads, head_width, height, width, kernel_size, seed, dtype)
    if terms == "no content":
        inputs[1] = None
    if terms == "no embeddings":
        inputs[3:] = None, None
    options = (inputs, grad, kernel_size, heads, border)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_equals_reference(run(*options, instructions), expected(*options), tolerance)


@pytest.mark.parametrize("instructions", ["", *INSTRUCTION_SETS])
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("n,heads,width", [(1, 1, 150), (5, 8, 6), (1, 8, 20)])
def test_bands_of_rows_equal_the_reference(n, heads, width, border, instructions):
    inputs, grad = make(n, heads, 4, 131, width, 7)
    options = (inputs, grad, 7, heads, border)
    assert_equals_reference(run(*options, instructions), expected(*options), 1e-5)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("n,width", [(1, 37), (9, 6)])
@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_large_logits_choose_their_neighbour(n, width, size, instructions):
    # A query meets +size at one place of the image, -size at all others: where its window has
    # that place, the output is the value there, and else the mean of the window's values.
    query = torch.ones(n, 2, 11, width)
    key = torch.full_like(query, -size / 2)
    key[:, :, 5, 3] = size / 2
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(query.shape, generator=generator)
    grad = torch.randn(query.shape, generator=generator)
    inputs = [query, key, value, None, None]
    results = run(inputs, grad, 5, 1, instructions=instructions)
    near = results[0][:, :, 3:8, 1:6]
    assert torch.equal(near, value[:, :, 5:6, 3:4].expand_as(near))
    # Where all logits are equal, gradients of queries are multiples of differences that cancel:
    # of `size` where they do not.
    exact = expected(inputs, grad, 5, 1)
    torch.testing.assert_close(results[0].double(), exact[0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[3].double(), exact[3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2].double(), exact[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1].double(), exact[1], rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("n,heads,height,width", [(1, 1, 20, 21), (5, 4, 9, 6)])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [0, 1, 2, None])
def test_nan_and_inf_spread_as_in_the_reference(
    index, number, n, heads, height, width, instructions
):
    inputs, grad = make(n, heads, 4, height, width, 5)
    spoil = grad if index is None else inputs[index]
    spoil[0, 1, height // 2, width - 2] = number
    results = run(inputs, grad, 5, heads, instructions=instructions)
    exact = expected(inputs, grad, 5, heads)
    for ours, theirs in zip(results[:4], exact[:4], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    # A spoiled query at the border spoils all entries of its head's embeddings, also of neighbours
    # that the image does not have.
    for ours, theirs in zip(results[4:], exact[4:], strict=True):
        assert not ours.isfinite()[~theirs.isfinite()].any()
        assert torch.equal(ours[1:].isfinite(), theirs[1:].isfinite())


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "n,heads,height,width", [(2, 4, 61, 37), (1, 2, 200, 19), (9, 4, 7, 7), (1, 1, 1, 1)]
)
def test_every_run_gives_the_same_bits(n, heads, height, width, threads, instructions):
    inputs, grad = make(n, heads, 8, height, width, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(inputs, grad, 7, heads, instructions=instructions)
        torch.set_num_threads(threads)
        again = run(inputs, grad, 7, heads, instructions=instructions)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_nan_stays_in_its_window(index, instructions):
    inputs, grad = make(1, 1, 4, 20, 21, 5)
    clean = run(inputs, grad, 5, 1, instructions=instructions)
    inputs[index][0, 1, 9, 15] = float("nan")
    results = run(inputs, grad, 5, 1, instructions=instructions)
    spoiled = torch.zeros(20, 21, dtype=torch.bool)
    if index == 0:
        spoiled[9, 15] = True
    else:
        spoiled[7:12, 13:18] = True
    # A NaN among the values spoils its own channel.
    channels = slice(1, 2) if index == 2 else slice(0, 4)
    assert torch.equal(results[0].isnan()[0, channels].all(0), spoiled)
    assert torch.equal(results[0].isnan().any(1)[0], spoiled)
    # Gradients of keys and values reach from a query's window to its neighbours' windows.
    far = torch.ones(20, 21, dtype=torch.bool)
    far[5:14, 11:20] = False
    for ours, exact in zip(results[1:4], clean[1:4], strict=True):
        assert torch.equal(ours[..., far], exact[..., far])


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_weights_follow_the_exponential(instructions):
    # Two pixels, so that the weights are a logistic function of the logit's difference.
    difference = torch.linspace(-100, 100, 4001)
    key = torch.zeros(4001, 2, 1, 2)
    key[:, 0, 0, 1] = difference
    query = torch.zeros_like(key)
    query[:, 0] = 1
    value = torch.zeros_like(key)
    value[:, :, 0, 1] = 1
    output = torch.ops.sasa_det_cpu.local_attention(
        query, key, value, None, None, 3, 1, True, instructions
    )
    exact = difference.double().sigmoid()
    actual = output[:, 0, 0, 0].double()
    # The query is rounded to float32 once more where logits become powers of 2, which shifts each
    # logit by as much as any rounding of it would.
    allowed = exact * (5e-7 + 1e-7 * difference.abs().double()) + 2e-38
    assert ((actual - exact).abs() <= allowed).all()


def test_unknown_instructions_are_named():
    inputs, _ = make(1, 1, 2, 3, 3, 3)
    with pytest.raises(ValueError, match="instructions must be one of .*plain.*, got sse9"):
        torch.ops.sasa_det_cpu.local_attention(*inputs, 3, 1, True, "sse9")
