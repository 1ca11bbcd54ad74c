"""The operation against equation 3, written as the loops it stands for."""

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sasa_det.ops import available_backends, local_attention, loop, operator

# The package's attribute of that name is the function.

# These have their own tests: without a GPU they need Triton's interpreter, or an emulation.
BACKENDS = [name for name in available_backends() if name not in ("triton", "cuda")]
DOUBLE = [name for name in BACKENDS if name != "cpu"]


def exact(backend):
    """Return the widest type a backend takes, and how close it comes to the literal loop."""
    if backend in DOUBLE:
        return torch.float64, {"rtol": 1e-10, "atol": 1e-10}
    return torch.float32, {"rtol": 1e-5, "atol": 1e-5}


def literal(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, border, content=True):
    """Equation 3, pixel by pixel and neighbour by neighbour, in float64."""
    n, channels, height, width = query.shape
    d, r = channels // num_heads, kernel_size // 2
    query, key, value = (x.double() for x in (query, key, value))
    output = torch.zeros(n, channels, height, width, dtype=torch.float64)
    for b, h, i, j in itertools.product(range(n), range(num_heads), range(height), range(width)):
        head = slice(h * d, (h + 1) * d)
        logits, values = [], []
        for da, db in itertools.product(range(-r, r + 1), repeat=2):
            a, c = i + da, j + db
            inside = 0 <= a < height and 0 <= c < width
            if not inside and border == "mask":
                continue
            q = query[b, head, i, j]
            logit = torch.zeros((), dtype=torch.float64)
            if inside and content:
                logit = logit + q @ key[b, head, a, c]
            if rel_rows is not None:
                embedding = torch.cat([rel_rows[h, :, da + r], rel_cols[h, :, db + r]]).double()
                logit = logit + q @ embedding
            logits.append(logit)
            values.append(value[b, head, a, c] if inside else torch.zeros(d, dtype=torch.float64))
        weights = torch.stack(logits).softmax(0)
        output[b, head, i, j] = (weights[:, None] * torch.stack(values)).sum(0)
    return output


def make_inputs(n, channels, height, width, kernel_size, num_heads, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, channels, height, width)] * 3
    shapes += [(num_heads, channels // num_heads // 2, kernel_size)] * 2
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


@functools.cache
def inputs_and_output(height, width, kernel_size, border):
    """What every backend gets, and what the literal loop makes of it."""
    inputs = make_inputs(1, 8, height, width, kernel_size, 2, torch.float32)
    with torch.no_grad():
        return inputs, literal(*inputs, kernel_size, 2, border)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "height,width,kernel_size",
    [(1, 1, 3), (1, 1, 11), (1, 6, 5), (4, 3, 1), (4, 3, 7), (7, 5, 9), (2, 9, 11), (13, 21, 7)],
)
def test_equals_a_literal_loop_of_equation_3(height, width, kernel_size, border, backend):
    inputs, expected = inputs_and_output(height, width, kernel_size, border)
    actual = local_attention(
        *inputs, kernel_size=kernel_size, num_heads=2, border=border, backend=backend
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content,relative", [(False, True), (True, False)])
def test_terms_of_the_logit_can_be_left_out(content, relative, border, backend):
    dtype, tolerance = exact(backend)
    query, key, value, rows, cols = make_inputs(2, 8, 4, 6, 5, 2, dtype)
    if not relative:
        rows = cols = None
    actual = local_attention(
        query,
        key if content else None,
        value,
        rows,
        cols,
        kernel_size=5,
        num_heads=2,
        border=border,
        content=content,
        backend=backend,
    )
    expected = literal(query, key, value, rows, cols, 5, 2, border, content)
    torch.testing.assert_close(actual.double(), expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_one_pixel_returns_the_value(backend):
    query, key, value, rows, cols = make_inputs(2, 8, 3, 4, 1, 2, exact(backend)[0])
    actual = local_attention(
        query, key, value, rows, cols, kernel_size=1, num_heads=2, backend=backend
    )
    torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_queries_average_the_window(backend):
    _, key, value, rows, cols = make_inputs(1, 4, 6, 5, 3, 2, exact(backend)[0])
    zero = torch.zeros_like(value)
    options = {"kernel_size": 3, "num_heads": 2, "backend": backend}
    pool = torch.nn.functional.avg_pool2d
    actual = local_attention(zero, key, value, rows, cols, border="mask", **options)
    torch.testing.assert_close(actual, pool(value, 3, 1, 1, count_include_pad=False))
    actual = local_attention(zero, key, value, rows, cols, border="zero", **options)
    torch.testing.assert_close(actual, pool(value, 3, 1, 1, count_include_pad=True))


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_the_window_has_influence(border, backend):
    kernel_size, row, col = 5, 4, 6
    query, key, value, rows, cols = make_inputs(1, 8, 9, 11, kernel_size, 2, exact(backend)[0])
    output = local_attention(
        query,
        key,
        value,
        rows,
        cols,
        kernel_size=kernel_size,
        num_heads=2,
        border=border,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(1)
    out_gradient = torch.randn(8, generator=generator, dtype=output.dtype)
    grads = torch.autograd.grad(output[0, :, row, col] @ out_gradient, [query, key, value])
    inside = torch.zeros(9, 11, dtype=torch.bool)
    inside[row - 2 : row + 3, col - 2 : col + 3] = True
    for grad in grads[1:]:
        reached = (grad[0] != 0).all(0)
        assert torch.equal(reached, inside)
    own = torch.zeros(9, 11, dtype=torch.bool)
    own[row, col] = True
    assert torch.equal((grads[0][0] != 0).any(0), own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_independent(backend):
    inputs = make_inputs(1, 12, 5, 6, 3, 3, exact(backend)[0])
    options = {"kernel_size": 3, "backend": backend}
    together = local_attention(*inputs, num_heads=3, **options)
    for head in range(3):
        part = [x[:, 4 * head : 4 * head + 4] for x in inputs[:3]]
        part += [x[head : head + 1] for x in inputs[3:]]
        alone = local_attention(*part, num_heads=1, **options)
        torch.testing.assert_close(together[:, 4 * head : 4 * head + 4], alone)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("content,relative", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("backend", DOUBLE)
def test_gradients_are_those_of_finite_differences(border, content, relative, backend):
    inputs = make_inputs(1, 8, 3, 4, 3, 2)
    if not content:
        del inputs[1]
    if not relative:
        del inputs[-2:]

    def function(query, *rest):
        rest = list(rest)
        key = rest.pop(0) if content else None
        value = rest.pop(0)
        rows, cols = rest if relative else (None, None)
        return local_attention(
            query,
            key,
            value,
            rows,
            cols,
            kernel_size=3,
            num_heads=2,
            border=border,
            content=content,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, inputs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from([2, 4, 6, 10]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1, 3, 5, 7, 9, 11]),
    st.sampled_from(["mask", "zero"]),
    st.integers(0, 2**31),
)
def test_loop_equals_the_reference(n, heads, head_width, height, width, kernel_size, border, seed):
    inputs = make_inputs(n, heads * head_width, height, width, kernel_size, heads, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    out_gradient = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("loop", "reference"):
        output = local_attention(
            *inputs, kernel_size=kernel_size, num_heads=heads, border=border, backend=backend
        )
        results.append([output, *torch.autograd.grad(output, inputs, out_gradient)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_goes_through(backend):
    inputs = make_inputs(0, 8, 5, 6, 3, 2, exact(backend)[0])
    output = local_attention(*inputs, kernel_size=3, num_heads=2, backend=backend)
    assert output.shape == (0, 8, 5, 6)
    grads = torch.autograd.grad(output.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    assert not grads[3].any() and not grads[4].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_some_inputs_alone(backend, wanted):
    dtype, tolerance = exact(backend)
    inputs = make_inputs(1, 8, 5, 6, 3, 2, dtype)
    options = {"kernel_size": 3, "num_heads": 2}
    output = local_attention(*(x.double() for x in inputs), **options, backend="reference")
    expected = torch.autograd.grad(output.square().sum(), [inputs[i] for i in wanted])
    alone = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    local_attention(*alone, **options, backend=backend).square().sum().backward()
    assert [i for i, x in enumerate(alone) if x.grad is not None] == list(wanted)
    tolerance = {"rtol": tolerance["rtol"], "atol": 10 * tolerance["atol"]}
    for i, grad in zip(wanted, expected, strict=True):
        torch.testing.assert_close(alone[i].grad, grad, **tolerance)


@pytest.mark.parametrize(
    "backend,dtype",
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.float16, torch.bfloat16)
        if (backend, dtype) != ("cpu", torch.float16)
    ],
)
def test_half_precision_accumulates_in_float32(dtype, backend):
    # 49 equal weights of 1/49 and values of 1: a sum in bfloat16 would lose two digits.
    value = torch.ones(1, 2, 9, 9, dtype=dtype)
    zero = torch.zeros_like(value)
    output = local_attention(
        zero, zero, value, None, None, kernel_size=7, num_heads=1, backend=backend
    )
    assert output.dtype == dtype
    assert torch.equal(output, value)
    inputs = make_inputs(1, 16, 6, 7, 5, 2, dtype)
    actual = local_attention(*inputs, kernel_size=5, num_heads=2, backend=backend)
    expected = local_attention(
        *(x.double() for x in inputs), kernel_size=5, num_heads=2, backend="reference"
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend):
    inputs = make_inputs(1, 16, 6, 7, 5, 2, torch.float32)
    options = {"kernel_size": 5, "num_heads": 2, "backend": backend}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = local_attention(*inputs, **options)
        grads = torch.autograd.grad(output.square().sum(), inputs)
        results.append([output, *grads])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    inputs = [(1e4 * x).detach().requires_grad_() for x in make_inputs(1, 8, 5, 6, 3, 2)]
    inputs = [x.float().detach().requires_grad_() for x in inputs]
    output = local_attention(*inputs, kernel_size=3, num_heads=2, backend=backend)
    grads = torch.autograd.grad(output.sum(), inputs)
    assert all(torch.isfinite(x).all() for x in (output, *grads))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_nan_stays_in_its_window(backend):
    inputs = make_inputs(1, 4, 9, 9, 5, 1, exact(backend)[0])
    query, key, value, rows, cols = (x.detach() for x in inputs)
    key[0, 0, 4, 4] = float("nan")
    output = local_attention(
        query, key, value, rows, cols, kernel_size=5, num_heads=1, backend=backend
    )
    spoiled = torch.zeros(9, 9, dtype=torch.bool)
    spoiled[2:7, 2:7] = True
    assert torch.equal(output.isnan().any(1)[0], spoiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    inputs = make_inputs(2, 8, 5, 6, 3, 2, exact(backend)[0])
    options = {"kernel_size": 3, "num_heads": 2, "backend": backend}
    expected = local_attention(*inputs, **options)
    strided = [x.to(memory_format=torch.channels_last) for x in inputs[:3]]
    torch.testing.assert_close(local_attention(*strided, *inputs[3:], **options), expected)
    sliced = [torch.cat([x, x], 3)[..., :6] for x in inputs[:3]]
    torch.testing.assert_close(local_attention(*sliced, *inputs[3:], **options), expected)


def test_loop_never_holds_a_window_of_channels():
    height = width = 24
    inputs = make_inputs(1, 256, height, width, 7, 8, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    # The backend's own functions: inside of an operator, the mode sees nothing.
    with torch.no_grad(), Watch():
        output, log_sum = loop.forward(*inputs, 7, 8, True)
        loop.backward(output, *inputs, log_sum, 7, 8, True)
    # The logits of 8 heads are the largest; 256 channels of windows would take 32 times more.
    assert 0 < largest <= 8 * 49 * height * width * 4


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_operator_passes_opcheck(backend):
    inputs = make_inputs(2, 8, 4, 5, 3, 2, torch.float32)
    operator = torch.ops.sasa_det.local_attention.default
    torch.library.opcheck(operator, (*inputs, 3, 2, True, backend))
    query, _, value, rows, cols = inputs
    torch.library.opcheck(operator, (query, None, value, rows, cols, 3, 2, False, backend))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs(1, 8, 4, 5, 3, 2, torch.float32)

    def function(*inputs):
        return local_attention(*inputs, kernel_size=3, num_heads=2, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("backend", ["loop", "cpu"])
def test_compiled_gradients_of_any_memory_layout(backend):
    if backend not in BACKENDS:
        pytest.skip("the C++ kernels are not there")
    inputs = make_inputs(1, 8, 4, 5, 3, 2, torch.float32)
    inputs = [x.detach().to(memory_format=torch.channels_last) for x in inputs[:3]] + inputs[3:]
    inputs = [x.detach().requires_grad_() for x in inputs]

    def function(*inputs):
        return local_attention(*inputs, kernel_size=3, num_heads=2, backend=backend)

    compiled = torch.compile(function, fullgraph=True)
    results = []
    for run in (function, compiled):
        output = run(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content,relative", [(False, True), (True, False)])
def test_gradients_without_a_term(content, relative, backend):
    dtype, tolerance = exact(backend)
    query, key, value, rows, cols = make_inputs(1, 8, 4, 6, 5, 2, dtype)
    terms = (key if content else None, value) + ((rows, cols) if relative else (None, None))
    options = {"kernel_size": 5, "num_heads": 2, "content": content}
    present = [x for x in (query, *terms) if x is not None]
    results = []
    for run in (backend, "reference"):
        output = local_attention(query, *terms, **options, backend=run)
        results.append(torch.autograd.grad(output.square().sum(), present))
    tolerance = {"rtol": tolerance["rtol"], "atol": 10 * tolerance["atol"]}
    torch.testing.assert_close(*results, **tolerance)


def test_exports_with_any_image_size():
    class Attention(torch.nn.Module):
        def forward(self, *inputs):
            return local_attention(*inputs, kernel_size=3, num_heads=2)

    inputs = tuple(x.detach() for x in make_inputs(2, 8, 4, 5, 3, 2, torch.float32))
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = {2: height, 3: width}
    program = torch.export.export(
        Attention(), inputs, dynamic_shapes=((sizes, sizes, sizes, None, None),)
    )
    others = make_inputs(2, 8, 9, 6, 3, 2, torch.float32)
    expected = local_attention(*others, kernel_size=3, num_heads=2)
    torch.testing.assert_close(program.module()(*others), expected)


def test_the_fastest_backend_that_takes_the_inputs_runs(caplog):
    operator.say_once.cache_clear()
    inputs = [x.detach() for x in make_inputs(1, 8, 4, 5, 3, 2)]
    with caplog.at_level("INFO"):
        for _ in range(2):
            local_attention(*inputs, kernel_size=3, num_heads=2)
    (message,) = caplog.messages
    assert message.startswith("local_attention runs on the loop backend (PyTorch, loops")
    assert "; cpu does not: " in message


def test_a_backend_that_cannot_run_says_why():
    inputs = make_inputs(1, 8, 4, 5, 3, 2)
    if "cpu" in BACKENDS:
        message = "backend 'cpu' cannot run here: it takes float32 or bfloat16, not torch.float64."
    else:
        message = "backend 'cpu' cannot run here: sasa_det was installed without its C"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        local_attention(*inputs, kernel_size=3, num_heads=2, backend="cpu")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kernel_size": 4}, "kernel_size must be odd and at least 1, got 4"),
        ({"kernel_size": 0}, "kernel_size must be odd and at least 1, got 0"),
        ({"kernel_size": 3.0}, "kernel_size must be an odd integer"),
        ({"num_heads": 3}, "channels 8 must be a multiple of num_heads 3"),
        ({"num_heads": 8}, "heads of width 1; the width must be even"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        ({"border": "reflect"}, r"border must be one of \['mask', 'zero'\], got 'reflect'"),
        ({"backend": "metal"}, r"backend must be None or one of .*, got 'metal'"),
        ({"key": None}, "key must be given unless content is False"),
        ({"rel_rows": None}, "rel_rows and rel_cols must be given together"),
        ({"rel_rows": None, "rel_cols": None, "content": False}, "content=False leaves only q.r"),
        ({"value": torch.zeros(1, 8, 4, 4)}, r"value must have query's shape \(1, 8, 4, 5\)"),
        ({"key": torch.zeros(1, 8, 4, 5, dtype=torch.float64)}, "key must have query's type"),
        ({"key": torch.zeros(1, 8, 4, 5, device="meta")}, "key must have query's type and device"),
        (
            {
                name: torch.zeros(1, 8, 4, 5, dtype=torch.int64)
                for name in ("query", "key", "value")
            },
            "query must be floating point, got torch.int64",
        ),
        (
            {name: torch.zeros(1, 8, 0, 5) for name in ("query", "key", "value")},
            r"query must have C, H, W >= 1, got shape \(1, 8, 0, 5\)",
        ),
        ({"kernel_size": True}, "kernel_size must be an odd integer"),
        ({"num_heads": True}, "num_heads must be an integer >= 1, got True"),
        ({"query": torch.zeros(8, 4, 5)}, r"query must be \(N, C, H, W\), got shape \(8, 4, 5\)"),
        ({"rel_rows": torch.zeros(2, 3, 3)}, r"rel_rows must be .* = \(2, 2, 3\), got \(2, 3, 3\)"),
        ({"rel_cols": torch.zeros(2, 2, 5)}, r"rel_cols must be .* = \(2, 2, 3\), got \(2, 2, 5\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ("query", "key", "value", "rel_rows", "rel_cols")
    arguments = dict(zip(names, make_inputs(1, 8, 4, 5, 3, 2, torch.float32), strict=True))
    arguments.update(kernel_size=3, num_heads=2)
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        local_attention(**arguments)


def test_float16_on_a_cpu_is_warned_of_once(caplog):
    operator._warn_of_float16.cache_clear()
    x = torch.randn(1, 16, 4, 4, dtype=torch.float16)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            local_attention(x, x, x, None, None, kernel_size=3, num_heads=2)
    (message,) = caplog.messages
    assert message.startswith("CPUs have no kernels for float16")
