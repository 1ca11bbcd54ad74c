"""The Triton kernels against the reference: compiled where there is a GPU, else interpreted."""

import pytest
import torch

from sasa_det.ops import available_backends, local_attention

pytestmark = [
    pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed"),
    # The interpreter computes masked lanes with numpy, which warns of what they hold.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts a float32 to bfloat16 where a GPU rounds it.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2,
}


def make(n, heads, head_width, height, width, kernel_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, heads * head_width, height, width)] * 4
    shapes += [(heads, head_width // 2, kernel_size)] * 2
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    query, key, value, grad = (x.to(DEVICE, dtype) for x in tensors[:4])
    rows, cols = (x.to(DEVICE) for x in tensors[4:])
    return [query, key, value, rows, cols], grad


def run(inputs, grad, backend, dtype=None, **options):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype) for x in inputs]
    present = [x.requires_grad_() for x in leaves if x is not None]
    content = leaves[1] is not None
    output = local_attention(*leaves, content=content, backend=backend, **options)
    return [output, *torch.autograd.grad(output, present, grad.to(output.dtype))]


def assert_equals_reference(inputs, grad, **options):
    expected = run(inputs, grad, "reference", torch.float64, **options)
    actual = run(inputs, grad, "triton", **options)
    tolerance = TOLERANCE[inputs[0].dtype]
    for i, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == exact.shape
        if exact.numel():
            error = (ours.double() - exact).abs().max()
            assert error <= tolerance * max(1.0, float(exact.abs().max())), i


# Each border with each choice of terms, and with each size.
TERMS = [(True, True), (False, True), (True, False)]
SIZES = [(1, 2, 4, 1, 1, 3), (2, 1, 8, 9, 3, 7), (1, 2, 2, 3, 9, 5)]
CASES = [
    (*size, *terms, ("mask", "zero")[(i + j) % 2])
    for i, size in enumerate(SIZES)
    for j, terms in enumerate(TERMS)
]


@pytest.mark.parametrize(
    "n,heads,head_width,height,width,kernel_size,content,relative,border", CASES
)
def test_equals_the_reference(
    n, heads, head_width, height, width, kernel_size, content, relative, border
):
    inputs, grad = make(n, heads, head_width, height, width, kernel_size)
    if not content:
        inputs[1] = None
    if not relative:
        inputs[3:] = None, None
    options = {"kernel_size": kernel_size, "num_heads": heads, "border": border}
    assert_equals_reference(inputs, grad, **options)


@pytest.mark.parametrize("kernel_size,border", [(1, "zero"), (9, "mask"), (11, "zero")])
def test_windows_of_other_sizes(kernel_size, border):
    inputs, grad = make(1, 1, 6, 5, 10, kernel_size)
    assert_equals_reference(inputs, grad, kernel_size=kernel_size, num_heads=1, border=border)


@pytest.mark.parametrize("head_width", [16, 32, 64])
def test_wide_heads(head_width):
    inputs, grad = make(1, 1, head_width, 6, 9, 7)
    assert_equals_reference(inputs, grad, kernel_size=7, num_heads=1)


def test_many_tiles_share_a_program(monkeypatch):
    monkeypatch.setattr("sasa_det.ops.triton_kernels._PROGRAMS", 1)
    monkeypatch.setattr("sasa_det.ops.triton_kernels._MOST_STEPS", 2)
    inputs, grad = make(1, 1, 4, 9, 10, 3)  # 5 x 2 tiles
    assert_equals_reference(inputs, grad, kernel_size=3, num_heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        inputs, grad = make(1, 1, 8, 5, 6, 5, dtype)
    else:
        inputs, grad = make(1, 2, 16, 5, 9, 7, dtype)
    size = inputs[3].shape[2]
    assert_equals_reference(inputs, grad, kernel_size=size, num_heads=inputs[3].shape[0])


def test_an_empty_batch_goes_through():
    inputs, grad = make(0, 2, 4, 5, 6, 3)
    output, *grads = run(inputs, grad, "triton", kernel_size=3, num_heads=2)
    assert output.shape == (0, 8, 5, 6)
    assert not grads[3].any() and not grads[4].any()


def test_memory_layout_does_not_matter():
    inputs, grad = make(1, 2, 4, 5, 9, 3)
    options = {"kernel_size": 3, "num_heads": 2}
    expected = run(inputs, grad, "triton", **options)
    strided = [x.to(memory_format=torch.channels_last) for x in inputs[:3]] + inputs[3:]
    actual = run(strided, grad.to(memory_format=torch.channels_last), "triton", **options)
    torch.testing.assert_close(actual, expected)


def test_large_logits_do_not_overflow():
    inputs, grad = make(1, 1, 4, 6, 9, 5)
    inputs = [1e4 * x for x in inputs]
    results = run(inputs, grad, "triton", kernel_size=5, num_heads=1)
    assert all(torch.isfinite(x).all() for x in results)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_nan_stays_in_its_window(index):
    inputs, _ = make(1, 1, 4, 12, 13, 5)
    inputs[index][0, 1, 6, 7] = float("nan")
    output = local_attention(*inputs, kernel_size=5, num_heads=1, backend="triton")
    spoiled = torch.zeros(12, 13, dtype=torch.bool)
    if index == 0:
        spoiled[6, 7] = True
    else:
        spoiled[4:9, 5:10] = True
    assert torch.equal(output.isnan().any(1)[0].cpu(), spoiled)


def test_an_infinite_value_stays_in_its_window():
    inputs, _ = make(1, 1, 4, 12, 13, 5)
    inputs[2][0, 1, 6, 7], inputs[2][0, 2, 6, 7] = float("inf"), float("-inf")
    options = {"kernel_size": 5, "num_heads": 1}
    expected = local_attention(*inputs, **options, backend="reference")
    actual = local_attention(*inputs, **options, backend="triton")
    assert expected.isposinf().sum() == expected.isneginf().sum() == 25
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_values_far_from_zero_do_not_spoil_gradients():
    # g.v is large then, and all but the same over a window.
    inputs, grad = make(1, 1, 8, 5, 9, 7, torch.bfloat16)
    inputs[2] = (inputs[2] + 100).bfloat16()
    assert_equals_reference(inputs, grad, kernel_size=7, num_heads=1)


def test_wider_heads_are_refused():
    inputs, _ = make(1, 1, 66, 3, 3, 3)
    with pytest.raises(RuntimeError, match="heads of width 64 at most, not 66"):
        local_attention(*inputs, kernel_size=3, num_heads=1, backend="triton")


def test_every_run_gives_the_same_bits():
    # A GPU runs the programs of many tiles at once, the interpreter one after the other.
    inputs, grad = make(1, 1, 8, *((33, 65) if DEVICE == "cuda" else (5, 9)), 7)
    options = {"kernel_size": 7, "num_heads": 1}
    first, second = (run(inputs, grad, "triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operator_passes_opcheck():
    inputs, _ = make(1, 1, 4, 3, 4, 3)
    operator = torch.ops.sasa_det.local_attention.default
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(operator, (*inputs, 3, 1, True, "triton"))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    inputs, _ = make(1, 1, 4, 5, 6, 3)
    with pytest.raises(RuntimeError, match="'triton' cannot run here: it takes CUDA tensors"):
        local_attention(*inputs, kernel_size=3, num_heads=1, backend="triton")
