"""The CUDA kernels of vector aggregation against the reference, on a CPU that emulates a GPU."""

import importlib

import pytest
import torch

from sasa_det.ops import aggregate, aggregation_cuda, cuda, vector_aggregation, window_product
from sasa_det.ops.aggregation_cuda import HEADER, STRUCTURE, TYPES, kernel_name
from sasa_det.ops.cuda_compiler import compile_kernel, missing
from tests.ops.test_vector_aggregation import SIZES, by_autograd, make

KERNELS = ("forward", "weight", "value")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def library(emulate_kernels):
    """The kernels of all types and window sizes, see conftest.py."""
    names = [
        kernel_name(kernel, dtype, kernel_size)
        for kernel in KERNELS
        for dtype in TYPES
        for kernel_size in (1, 3, 7)
    ]
    return emulate_kernels([HEADER], dict.fromkeys(names, STRUCTURE))


@pytest.fixture
def emulated(library, monkeypatch):
    """Let the kernels take CPU tensors; return the names of those that started."""
    started = []
    tensors = {}

    def keep(kernel, groups, kernel_size, result, **others):
        tensors["read"], tensors["written"] = list(others.values()), [result]
        result.fill_(torch.nan)
        start(kernel, groups, kernel_size, result, **others)

    def emulate(launch, like):
        message, _ = library.start(launch, **tensors)
        assert message == ""
        started.append(launch.name.split("<")[0])

    start = aggregation_cuda._start
    monkeypatch.setattr(aggregation_cuda, "_start", keep)
    monkeypatch.setattr(cuda, "start", emulate)
    # Its name in the package is that of the function.
    module = importlib.import_module("sasa_det.ops.vector_aggregation")
    monkeypatch.setattr(module, "_kernels_for", lambda *arguments: "cuda")
    return started


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shared,groups,kernel_size", [(8, 2, 7), (11, 3, 3), (1, 2, 1)])
@pytest.mark.parametrize("size", SIZES[:-1])
def test_kernels_equal_the_reference(emulated, size, shared, groups, kernel_size, dtype):
    weight, value, grad = make(2, shared, groups, *size, kernel_size, dtype)
    expected = by_autograd(weight, value, grad, kernel_size)
    weight.requires_grad_(), value.requires_grad_()
    output = vector_aggregation(weight, value, kernel_size)
    output.backward(grad)
    assert emulated == [f"vector_aggregation_{kernel}" for kernel in KERNELS]
    for ours, exact in zip((output, weight.grad, value.grad), expected, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= TOLERANCE[dtype]


def test_products_of_windows(emulated):
    query, key = (torch.randn(2, 20, 4, 5, requires_grad=True) for _ in range(2))
    product = window_product(query, key, 3)
    grad = torch.randn(product.shape)
    ours = torch.autograd.grad(product, (query, key), grad)
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    # The products are the gradient of the weights of an aggregation of one group.
    weight = torch.zeros(2, 1, 9, 4, 5, dtype=torch.float64, requires_grad=True)
    output = aggregate(exact[1], weight, kernel_size=3)
    (expected,) = torch.autograd.grad(output, weight, exact[0], create_graph=True)
    theirs = torch.autograd.grad(expected, exact, grad.double()[:, None])
    torch.testing.assert_close(product.double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_mixed_types_slices_and_no_images(emulated):
    weight, value, grad = make(2, 4, 2, 5, 6, 3, torch.float32)
    expected = by_autograd(weight.bfloat16(), value, grad, 3)
    wide = torch.cat([value, value], 1)[:, : value.shape[1]].requires_grad_()
    narrow = weight.bfloat16().requires_grad_()
    output = vector_aggregation(narrow, wide, 3)
    assert output.dtype == torch.float32
    gradients = torch.autograd.grad(output, (narrow, wide), grad)
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.float32]
    for ours, exact in zip((output, *gradients), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-2)
    # As on CPUs, weights of float64 are rounded to the type of the sums.
    exact = by_autograd(weight, value, grad, 3)[0]
    torch.testing.assert_close(
        vector_aggregation(weight.double(), value, 3).double(), exact, rtol=1e-5, atol=1e-5
    )
    count = len(emulated)
    weight, value = weight[:0].requires_grad_(), value[:0].requires_grad_()
    vector_aggregation(weight, value, 3).sum().backward()
    assert weight.grad.shape == weight.shape and value.grad.shape == value.shape
    assert len(emulated) == count


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_the_check_at_first_use_finds_what_is_wrong(emulated, monkeypatch, caplog, kernel_size):
    device = torch.device("cpu")
    errors = aggregation_cuda.errors_of(device, kernel_size)
    assert len(errors) == 3 and 0 < max(errors.values()) <= aggregation_cuda.TOLERANCE / 10
    right = aggregation_cuda.forward
    monkeypatch.setattr(aggregation_cuda, "forward", lambda *inputs: 1.001 * right(*inputs))
    assert "output differs from PyTorch's by 0.001" in aggregation_cuda._problem(
        device, kernel_size
    )
    assert "vector_aggregation does not use its CUDA kernels: output differs" in caplog.text


def test_defaults_do_not_change_the_check(emulated, other_defaults):
    errors = aggregation_cuda.errors_of(torch.device("cpu"), 3)
    assert max(errors.values()) <= aggregation_cuda.TOLERANCE / 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_the_kernels_do_not_take():
    def reason(kernel_size=7, **options):
        return aggregation_cuda.why_not(torch.empty(1, 8, 3, 4, **options), 2, kernel_size)

    assert reason() == "they take CUDA tensors, not cpu"
    # meta tensors stand for those of a GPU, whose type is asked first
    assert reason(device="meta") == "they take CUDA tensors, not meta"


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_within_limits(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kernel in KERNELS:
        for dtype in (torch.float32, torch.bfloat16):
            compiled = compile_kernel(HEADER, kernel_name(kernel, dtype, 7), architecture)
            assert compiled.resources.spill_bytes <= 16
            # Four blocks of 256 threads fit an SM.
            assert compiled.resources.registers <= 64
