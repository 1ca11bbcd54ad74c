"""The stem's CUDA kernels against PyTorch, on a CPU that emulates the warps of a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sasa_det.layers import AttentionStem
from sasa_det.ops import cuda, stem_check, stem_cuda
from sasa_det.ops.blocks import place_matrices
from sasa_det.ops.cuda_compiler import compile_kernel, missing
from sasa_det.ops.stem_cuda import combine
from sasa_det.ops.stem_kernels import HEADER, launch_of

# Channels of the image, heads and their width.
SHAPES = {"usual": (3, 4, 16), "narrow": (3, 8, 8), "one channel": (1, 2, 4), "wide": (4, 2, 32)}
STRUCTURES = {
    "stem_attention_forward": "StemForwardArguments",
    "stem_attention_backward": "StemBackwardArguments",
}


@pytest.fixture(scope="module")
def library(emulate_kernels):
    """The kernels of all shapes, see conftest.py."""
    structures = {
        f"{kernel}<{channels}, {width}>": structure
        for kernel, structure in STRUCTURES.items()
        for channels, _, width in SHAPES.values()
    }
    return emulate_kernels([HEADER], structures)


@pytest.fixture
def emulated(library, monkeypatch):
    """Let the kernels run here, in two blocks of threads; return what can skip a barrier."""
    options = {"skipped": -1, "seed": 0}

    def launch_with_poison(kernel, inputs, grid, **tensors):
        for name in ("extremes", "moments", "grad_values", "grad_logits"):
            if name in tensors:
                tensors[name].fill_(torch.nan)
        return launch_of(kernel, inputs, grid, **tensors)

    def start(launch, like):
        message, _ = library.start(launch, **options)
        assert message == ""

    monkeypatch.setattr(stem_cuda, "launch_of", launch_with_poison)
    monkeypatch.setattr(cuda, "start", start)
    monkeypatch.setattr(stem_cuda, "_grid", lambda inputs: 2)
    return options


def make(shape="usual", size=(2, 9, 7), dtype=torch.float64, **options):
    torch.manual_seed(0)
    in_channels, heads, width = SHAPES[shape]
    stem = AttentionStem(in_channels, heads * width, heads, norm=nn.BatchNorm2d, **options)
    with torch.no_grad():
        # Logits that matter, and norms of both signs.
        stem.query.weight.normal_(), stem.key.weight.normal_()
        stem.norm.weight.normal_(), stem.norm.bias.normal_()
    x = torch.randn(size[0], in_channels, *size[1:])
    return stem.to(dtype), x.to(dtype)


def by_kernels(stem, x, eps):
    """Run a stem of float32 with the kernels, which take the tensors of its parameters."""
    _, key, value, mixing, *embeddings = stem._tensors()
    matrices = place_matrices(value, value.new_ones(1, 4, 4) if mixing is None else mixing)
    return stem_cuda.normalized(
        x, stem.query.weight.flatten(1), key.flatten(1), matrices, *embeddings,
        stem.norm.weight, stem.norm.bias, stem.num_heads, eps,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"relative": False}, {"values": "pointwise"}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(2, 9, 7), (1, 3, 2)], ids=str)
def test_output_and_gradients(emulated, shape, size, options):
    exact, x = make(shape, size, **options)
    stem, _ = make(shape, size, torch.float32, **options)
    attended = exact._attend(x)
    expected = exact._pool(attended)
    output, mean, variance = by_kernels(stem, x.float(), exact.norm.eps)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    moments = attended.mean((0, 2, 3)), attended.var((0, 2, 3), correction=0)
    torch.testing.assert_close((mean.double(), variance.double()), moments, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output.backward(grad.float())
    for (name, parameter), theirs in zip(stem.named_parameters(), exact.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        error = (parameter.grad.double() - theirs.grad).abs().max().item()
        # The gradients of embeddings of a norm's input are small differences of large sums.
        assert error <= 2e-4 * scale + 2e-5, name


def test_without_statistics(emulated):
    """A norm that is weight and bias alone."""
    exact, x = make()
    stem, _ = make(dtype=torch.float32)
    scale, shift = (t.detach()[:, None, None] for t in (exact.norm.weight, exact.norm.bias))
    expected = F.relu(F.max_pool2d(exact._attend(x) * scale + shift, 4, ceil_mode=True))
    output, mean, variance = by_kernels(stem, x.float(), None)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    assert mean.numel() == variance.numel() == 0
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output.backward(grad.float())
    for ours, theirs in ((stem.key, exact.key), (stem.query, exact.query)):
        torch.testing.assert_close(
            ours.weight.grad.double(), theirs.weight.grad, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("skipped", range(3))
def test_no_barrier_is_superfluous(emulated, skipped):
    """Of the first blocks of the image; the order of threads is random."""
    stem, x = make(dtype=torch.float32)
    expected = by_kernels(stem, x, 1e-5)[0]
    emulated["skipped"] = skipped
    outputs = []
    for emulated["seed"] in range(4):
        outputs.append(by_kernels(stem, x, 1e-5)[0])
    assert any(not torch.allclose(output, expected) for output in outputs)


def test_check_before_the_first_use(emulated):
    errors = stem_check.errors_of(torch.device("cpu"), 3, 4, 16)
    assert len(errors) == 9 and max(errors.values()) <= stem_check.TOLERANCE / 10


def test_defaults_do_not_change_the_check(emulated, other_defaults):
    errors = stem_check.errors_of(torch.device("cpu"), 3, 4, 16)
    assert max(errors.values()) <= stem_check.TOLERANCE / 10


def test_the_matrices_that_the_kernels_take_are_exact():
    """Products would be in TF32 where a user wants it, of which the check sees the rounding."""
    tensors = [torch.randn(12, 3), torch.randn(12, 3), *torch.randn(2, 2, 3, 7)]
    found = combine(*tensors, 2)
    query, key, rel_rows, rel_cols = (x.double() for x in tensors)
    query = query.reshape(2, 6, 3) / math.log(2)
    expected = [
        torch.einsum("hdi,hdj->hij", query, key.reshape(2, 6, 3)),
        torch.einsum("hdo,hdi->hoi", rel_rows, query[:, :3]),
        torch.einsum("hdo,hdi->hoi", rel_cols, query[:, 3:]),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(missing() is not None, reason="NVRTC is not installed")
@pytest.mark.parametrize("kernel,registers", [("forward", 128), ("backward", 255)])
def test_compiles_without_spills(kernel, registers):
    compiled = compile_kernel(HEADER, f"stem_attention_{kernel}<3, 16>", "sm_90")
    assert compiled.resources.spill_bytes == 0
    assert compiled.resources.registers <= registers


def test_moments_of_groups():
    x = torch.randn(100, 5, dtype=torch.float64) + 1000
    parts = x.split([40, 59, 1])
    groups = []
    for part in parts:
        number = torch.full((5,), float(len(part)))
        squares = part.var(0, correction=0) * len(part)
        groups.append(torch.stack([number, part.mean(0), squares]))
    groups.append(torch.zeros(3, 5))
    mean, variance = stem_cuda.merge_moments(torch.stack([g.double() for g in groups]))
    torch.testing.assert_close(mean.double(), x.mean(0))
    torch.testing.assert_close(variance.double(), x.var(0, correction=0), rtol=1e-6, atol=0)
