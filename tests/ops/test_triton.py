"""The Triton kernels against the reference: compiled where there is a GPU, else interpreted."""

import math
from types import SimpleNamespace

import pytest
import torch

from sasa_det.ops import (
    available_backends,
    local_attention,
    triton,
    triton_constants,
    triton_kernels,
)

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


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


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
    inputs, grad = make(1, 1, 6, 5, 6, kernel_size)
    assert_equals_reference(inputs, grad, kernel_size=kernel_size, num_heads=1, border=border)


@pytest.mark.parametrize("head_width", [12, 32, 64])
def test_wide_heads(head_width):
    inputs, grad = make(1, 1, head_width, 3, 9, 7)
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
    inputs, grad = make(2, 1, 4, 2, 9, 3)
    options = {"kernel_size": 3, "num_heads": 1}
    expected = run(inputs, grad, "triton", **options)
    together = torch.cat([x.permute(0, 2, 3, 1) for x in inputs[:3]], 3)
    slices = [x.permute(0, 3, 1, 2) for x in together.split(4, 3)]
    dense = [x.to(memory_format=torch.channels_last) for x in inputs[:3]]
    for images in (slices, dense, [slices[0], *inputs[1:3]]):
        actual = run([*images, *inputs[3:]], grad, "triton", **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_slices_of_one_tensor_are_not_copied():
    from sasa_det.ops.triton_kernels import _with_one_stride, forward

    together = torch.randn(2, 3, 5, 24)
    slices = [x.permute(0, 3, 1, 2) for x in together.split(8, 3)]
    for kernel_input, x in zip(_with_one_stride(*slices), slices, strict=True):
        assert kernel_input.data_ptr() == x.data_ptr()
    # Rows apart from each other, and images of which only some are slices, are copied.
    for images in ([x[..., :4] for x in slices], [slices[0], slices[1].contiguous()]):
        assert all(x.is_contiguous() for x in _with_one_stride(*images))
    output, _ = forward(*(x[:1].to(DEVICE) for x in slices), None, None, 1, 1, True)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_large_logits_do_not_overflow():
    inputs, grad = make(1, 1, 4, 6, 9, 5)
    inputs = [1e4 * x for x in inputs]
    results = run(inputs, grad, "triton", kernel_size=5, num_heads=1)
    assert all(torch.isfinite(x).all() for x in results)


# One pixel of 5 x 10, in tiles of 2 x 8, and the pixels whose windows contain it.
PLACE = (3, 7)
WINDOW = (slice(2, 5), slice(6, 9))


def spoiled_pixels(x):
    return (~x.isfinite()).any(1)[0].cpu()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_nan_stays_in_its_window(index):
    inputs, grad = make(1, 1, 4, 5, 10, 3)
    inputs[index][0, 1][PLACE] = float("nan")
    output, *gradients = run(inputs, grad, "triton", kernel_size=3, num_heads=1)
    seen = torch.zeros(5, 10, dtype=torch.bool)
    if index == 0:
        seen[PLACE] = True
    else:
        seen[WINDOW] = True
    assert torch.equal(spoiled_pixels(output), seen)
    expected = run(inputs, grad, "loop", kernel_size=3, num_heads=1)[1:]
    for ours, theirs in zip(gradients[:3], expected[:3], strict=True):
        assert torch.equal(spoiled_pixels(ours), spoiled_pixels(theirs))
        torch.testing.assert_close(
            *(x.masked_fill(~x.isfinite(), 0) for x in (ours, theirs)), rtol=1e-5, atol=1e-5
        )


def test_a_nan_gradient_stays_in_its_window():
    inputs, grad = make(1, 1, 4, 5, 10, 3)
    grad[0, 1][PLACE] = float("nan")
    _, query, key, value, _, _ = run(inputs, grad, "triton", kernel_size=3, num_heads=1)
    own = torch.zeros(5, 10, dtype=torch.bool)
    own[PLACE] = True
    window = torch.zeros_like(own)
    window[WINDOW] = True
    assert torch.equal(spoiled_pixels(query), own)
    assert torch.equal(spoiled_pixels(key), window)
    assert torch.equal(spoiled_pixels(value), window)


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_an_infinite_value_stays_in_its_window(border):
    inputs, _ = make(1, 1, 4, 5, 10, 3)
    inputs[2][0, 1][PLACE], inputs[2][0, 2][PLACE] = float("inf"), float("-inf")
    options = {"kernel_size": 3, "num_heads": 1, "border": border}
    expected = local_attention(*inputs, **options, backend="reference")
    actual = local_attention(*inputs, **options, backend="triton")
    assert expected.isposinf().sum() == expected.isneginf().sum() == 9
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("content,relative", [(True, True), (False, True), (True, False)])
def test_pixels_beside_what_is_not_finite(content, relative, border):
    inputs, grad = make(1, 2, 4, 2, 9, 3)
    if content:
        # All weights of this key are 0: what has no product with it stays finite.
        inputs[0][:, 0] = inputs[0][:, 0].abs()
        inputs[1][0, 0, 1, 3] = float("-inf")
    else:
        inputs[1] = None
        inputs[2][0, 1, 1, 3] = float("nan")
    if not relative:
        inputs[3:] = None, None
    options = {"kernel_size": 3, "num_heads": 2, "border": border}
    actual = run(inputs, grad, "triton", **options)
    expected = run(inputs, grad, "loop", **options)
    assert any(x.isnan().any() for x in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kernel_size,border", [(1, "zero"), (3, "mask"), (7, "mask")])
def test_windows_whose_logits_are_all_minus_infinity_are_nan(kernel_size, border):
    inputs, grad = make(1, 1, 8, 6, 14, kernel_size)
    inputs[0][:, 0] = inputs[0][:, 0].abs() + 1
    inputs[1][:, 0, :, :7] = -math.inf
    options = {"kernel_size": kernel_size, "num_heads": 1, "border": border}
    expected = run(inputs, grad, "reference", torch.float64, **options)
    assert expected[0].isnan().any() and expected[0].isfinite().any()
    for ours, exact in zip(run(inputs, grad, "triton", **options), expected, strict=True):
        assert torch.equal(ours.isfinite(), exact.isfinite())
        finite = exact.isfinite()
        assert torch.allclose(ours[finite].double(), exact[finite], atol=1e-4)


def test_values_far_from_zero_do_not_spoil_gradients():
    # g.v is large then, and all but the same over a window.
    inputs, grad = make(1, 1, 8, 5, 9, 7, torch.bfloat16)
    inputs[2] = (inputs[2] + 100).bfloat16()
    assert_equals_reference(inputs, grad, kernel_size=7, num_heads=1)


def test_small_gpus_are_refused():
    h100 = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)
    assert triton.why_not_on(h100) is None
    older = SimpleNamespace(major=7, minor=5, shared_memory_per_block_optin=65536)
    assert "compute capability 8.0 and higher, not 7.5" in triton.why_not_on(older)
    smaller = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=32768)
    assert "may need 65536 bytes of shared memory" in triton.why_not_on(smaller)


@pytest.mark.parametrize("precision,expected", [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_float32_is_as_exact_as_convolutions(precision, expected, monkeypatch):
    monkeypatch.setattr(triton_constants.triton.knobs.runtime, "interpret", False)
    torch.backends.cudnn.conv.fp32_precision = precision
    wanted = triton_kernels._tf32_is_wanted()
    constants = triton_constants.kernel_constants("forward", torch.float32, 32, 7, tf32=wanted)
    assert constants["PRECISION"] == expected


def test_too_large_windows_and_rows_are_refused():
    inputs, _ = make(1, 1, 4, 1, 1, 27)
    with pytest.raises(RuntimeError, match="a kernel_size of 25 at most, not 27"):
        local_attention(*inputs, kernel_size=27, num_heads=1, backend="triton")
    row = torch.empty(1, 64, 1, 1).expand(1, 64, 1, 2**20)
    reason = triton.why_not(row, 1, 3, forced=True)
    assert "rows of 1048576 pixels of 64 channels" in reason


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
