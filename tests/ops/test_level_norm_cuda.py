"""The CUDA kernels of norms of levels against PyTorch, on a CPU that emulates a GPU."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

from sasa_det.ops import level_norm_cuda
from sasa_det.ops.cuda_compiler import compile_kernel, missing
from sasa_det.ops.level_norm_cuda import (
    KERNELS,
    TYPES,
    apply,
    header_of,
    kernel_name,
    launch_of,
    normalize,
    reference,
    why_not,
    why_not_like,
)

F32, BF16, FP16 = TYPES
# Of the largest value; rounding of results in 16 bits makes nearly all of it.
TOLERANCE = {F32: 1e-5, BF16: 4e-3, FP16: 5e-4}
MOMENTUM, EPS = 0.1, 1e-5
RESULTS = {
    "moments": {"parts"},
    "finish": {"moments", "totals", "mean", "rstd", "scale", "shift"},
    "apply": {"y"},
    "sums": {"parts"},
    "parameters": {"sums", "grad_weight", "grad_bias"},
    "gradient": {"grad_x"},
}
# Channels and pixels of levels: of several runs, of one that is full, of two pixels and of none;
# threads that are left over, few and many; one thread and many for all channels.
SHAPES = {
    "usual": (256, (300, 2)),
    "narrow": (8, (4100, 3)),
    "four": (64, (1100, 512, 0, 37)),
    "odd": (24, (1400, 2)),
    "wide": (520, (70,)),
}


@pytest.fixture(scope="module")
def library(emulate_kernels):
    """The kernels of all types, see conftest.py."""
    structures = {
        kernel_name(kernel, dtype): structure
        for dtype in TYPES
        for kernel, (structure, _) in KERNELS.items()
    }
    return emulate_kernels(sorted(set(map(header_of, KERNELS))), structures)


class Emulated:
    """Starts the kernels here.

    Attributes:
        started: names of kernels, in their order.
        barriers: of each kernel.
        skipped: numbers of barriers that no thread waits at, by kernel.
        seed: of the order of threads.
    """

    def __init__(self, library):
        self.started, self.barriers, self.skipped, self.seed = [], {}, {}, 0
        self._library, self._lock = library, threading.Lock()
        self._read, self._written = [], []

    def start(self, kernel, like, pixels, numbers=None, **tensors):
        """Stand in for ``level_norm_cuda._start``: results begin as NaN."""
        written = [x for name, x in tensors.items() if name in RESULTS[kernel]]
        read = [x for name, x in tensors.items() if name not in RESULTS[kernel]]
        for x in written:
            x.fill_(torch.nan)
        launch = launch_of(kernel, like.dtype, pixels, like.shape[1], numbers or {}, **tensors)
        if launch is None:
            return
        with self._lock:
            if kernel == "finish":
                read, written = read + self._read, written + self._written
            message, self.barriers[kernel] = self._library.start(
                launch, read, written, self.skipped.get(kernel, -1), self.seed
            )
            self.started.append(kernel)
        assert message == ""

    def note(self, name, tensors):
        """Let kernels use what they are given in tables of pointers."""
        known = self._written if name.startswith("running") else self._read
        known += [x for x in tensors if x is not None]


@pytest.fixture
def emulated(library, monkeypatch):
    """See :class:`Emulated`."""
    kernels, addresses = Emulated(library), level_norm_cuda._addresses

    def noted(name, tensors, like):
        kernels.note(name, tensors)
        return addresses(name, tensors, like)

    monkeypatch.setattr(level_norm_cuda, "_start", kernels.start)
    monkeypatch.setattr(level_norm_cuda, "_addresses", noted)
    return kernels


def make(shape, dtype, offset=0.0, seed=0):
    """Make pixels, x, what the norms of levels have, and a gradient."""
    torch.manual_seed(seed)
    channels, pixels = SHAPES.get(shape, shape)
    x = (offset + torch.randn(sum(pixels), channels)).to(dtype)
    weights, biases, means = (list(torch.randn(len(pixels), channels)) for _ in range(3))
    variances = [1 + m.square() for m in means]
    return pixels, x, (weights, biases, means, variances), torch.randn(x.shape).to(dtype)


def doubled(norms):
    return [[None if t is None else t.double() for t in tensors] for tensors in norms]


def leave_out_the_bend(grad, output):
    """Make the gradient 0 where rounding decides which side of the ReLU a value is on."""
    return torch.where(output.abs() > 1e-3, grad, 0)


def run(function, x, pixels, norms, grad, **options):
    """Return output, gradients of x, weights and biases, and statistics of levels."""
    x = x.detach().requires_grad_()
    weights, biases = ([t.detach().requires_grad_() for t in tensors] for tensors in norms[:2])
    statistics = [[t.clone() for t in tensors] for tensors in norms[2:]]
    output = function(x, pixels, weights, biases, *statistics, MOMENTUM, EPS, **options)
    of_x, *rest = torch.autograd.grad(output, [x, *weights, *biases], grad.to(x.dtype))
    levels = len(pixels)
    lists = rest[:levels], rest[levels:], *statistics
    return [output.detach(), of_x, *map(torch.stack, lists)]


def errors(ours, exact):
    """Return the errors of results, of their largest value; NaN if one of them is."""
    return [
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(ours, exact, strict=True)
    ]


def compare(shape, dtype, offset=0.0):
    """Return the errors of the kernels' results."""
    pixels, x, norms, grad = make(shape, dtype, offset)
    exact, x64 = doubled(norms), x.double()
    grad = leave_out_the_bend(grad, run(reference, x64, pixels, exact, grad)[0])
    ours = run(normalize, x, pixels, norms, grad)
    assert ours[0].dtype == ours[1].dtype == dtype
    return errors(ours, run(reference, x64, pixels, exact, grad))


@pytest.mark.parametrize(
    "shape,dtype",
    [("usual", BF16), ("narrow", F32), ("narrow", FP16), ("four", F32), ("four", FP16)]
    + [("odd", F32), ("odd", BF16), ("wide", BF16)],
    ids=str,
)
def test_output_gradients_and_statistics(emulated, shape, dtype):
    output, of_x, *rest = compare(shape, dtype)
    assert emulated.started == list(RESULTS)
    assert output <= TOLERANCE[dtype] and of_x <= TOLERANCE[dtype]
    # What there is of each channel is float32 whatever the maps are.
    assert max(rest) <= TOLERANCE[F32]


@pytest.mark.parametrize("dtype,offset", [(F32, 1000.0), (BF16, -300.0), (FP16, 500.0)], ids=str)
def test_means_far_from_zero(emulated, dtype, offset):
    """No more digits are lost than those that x and its mean do not have."""
    output, of_x, *of_norms, _, variances = compare((24, (1400,)), dtype, offset)
    assert variances <= 2e-6
    assert max(output, of_x) <= max(TOLERANCE[dtype], 5e-5)
    # The error of the mean counts as often as there are pixels; PyTorch's float32 has 6e-4.
    assert max(of_norms) <= 3e-4


def test_what_is_not_finite_stays_in_its_channel_and_level(emulated):
    pixels, x, norms, grad = make("four", F32)
    x[1100 + 7, 5] = torch.nan
    x[3, 60] = torch.inf
    ours = run(normalize, x, pixels, norms, grad)
    exact = run(reference, x.double(), pixels, doubled(norms), grad)
    for one, other in zip(ours, exact, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
        one[~one.isfinite()] = other[~other.isfinite()] = 0
    assert max(errors(ours, exact)) <= TOLERANCE[F32]
    assert pixels[:2] == (1100, 512) and (ours[0][1100:1612, 5] == 0).all()


def test_norms_without_running_statistics(emulated):
    """And gradients of parameters alone, from one that is the same number everywhere."""
    pixels, x, norms, _ = make((16, (50, 40)), F32)
    norms[2][0] = norms[3][1] = None
    exact = doubled(norms)
    leaves = [t.requires_grad_() for tensors in norms[:2] for t in tensors]
    theirs = [t.requires_grad_() for tensors in exact[:2] for t in tensors]
    versions = norms[2][1]._version, norms[3][0]._version
    # Not aligned to 16 bytes.
    moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    output = normalize(moved, pixels, *norms, MOMENTUM, EPS)
    mean, variance = norms[2][1], norms[3][0]
    assert mean._version > versions[0] and variance._version > versions[1]
    parts = zip(x.double().split(pixels), *exact, strict=True)
    expected = torch.cat(
        [
            F.relu(F.batch_norm(level, None, None, weight, bias, True, MOMENTUM, EPS))
            for level, weight, bias, *_ in parts
        ]
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        mean.double(), exact[2][1].lerp(x[50:].double().mean(0), MOMENTUM), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        variance.double(), exact[3][0].lerp(x[:50].double().var(0), MOMENTUM), rtol=1e-5, atol=1e-6
    )
    ours = torch.autograd.grad(output.sum(), leaves)
    for one, other in zip(ours, torch.autograd.grad(expected.sum(), theirs), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert emulated.started == ["moments", "finish", "apply", "sums", "parameters"]


def test_scales_and_shifts_of_levels(emulated):
    pixels, x, (scales, shifts, *_), _ = make("four", BF16)
    scales, shifts = torch.stack(scales), torch.stack(shifts)
    output = apply(x, pixels, scales, shifts)
    lines = [t.double().repeat_interleave(torch.tensor(pixels), 0) for t in (scales, shifts)]
    expected = F.relu(x.double() * lines[0] + lines[1])
    assert errors([output], [expected])[0] <= TOLERANCE[BF16]
    assert emulated.started == ["apply"]
    assert apply(x[:0], (0, 0), scales[:2], shifts[:2]).shape == (0, 64)


def test_no_pixels_at_all(emulated):
    _, x, norms, grad = make((16, (0, 0)), F32)
    output, of_x, *of_norms, means, variances = run(normalize, x, (0, 0), norms, grad)
    assert output.shape == of_x.shape == (0, 16)
    assert all(torch.equal(t, torch.zeros(2, 16)) for t in of_norms)
    assert torch.equal(means, torch.stack(norms[2]))
    assert torch.equal(variances, torch.stack(norms[3]))


@pytest.mark.parametrize(
    "kernel,barriers", [("moments", 5), ("finish", 1), ("sums", 5), ("parameters", 1)]
)
def test_no_barrier_is_superfluous(emulated, kernel, barriers):
    """And with all of them, the order of threads does not matter to any bit."""
    pixels, x, norms, grad = make((64, (600,)), BF16)
    right = run(normalize, x, pixels, norms, grad)
    assert emulated.barriers[kernel] == barriers
    emulated.seed = 1
    assert all(map(torch.equal, run(normalize, x, pixels, norms, grad), right))
    for emulated.skipped[kernel] in range(barriers):
        assert not all(map(torch.equal, run(normalize, x, pixels, norms, grad), right))


def test_processes_have_one_batch_together(emulated):
    """Two, as threads with a group of gloo, of which one has no pixel of a level."""
    sizes = [(600, 5, 1, 0), (40, 2, 0, 3)]
    made = [make((16, pixels), F32, 3.0, seed) for seed, pixels in enumerate(sizes)]
    store, results = torch.distributed.HashStore(), [None, None]
    norms = made[0][2]

    def process(rank):
        group = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        own, x, _, grad = made[rank]
        results[rank] = run(normalize, x, own, norms, grad, group=group)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert emulated.started.count("finish") == 4
    assert all(map(torch.equal, results[0][4:], results[1][4:]))

    def of_both(level, tensors):
        parts = zip(tensors, sizes, strict=True)
        return torch.cat([x.double().split(pixels)[level] for x, pixels in parts])

    for level in (0, 1, 3):  # PyTorch has no batch of one pixel
        x, grad = (of_both(level, [inputs[i] for inputs in made]) for i in (1, 3))
        exact = [[t[level]] for t in doubled(norms)]
        output, of_x, *of_norm = run(reference, x, (len(x),), exact, grad)
        for i, expected in enumerate((output, of_x)):
            ours = of_both(level, [result[i] for result in results])
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
        # Gradients of parameters are those of a process.
        halves = [[result[i][level].double() for result in results] for i in range(2, 6)]
        ours = [sum(halves[0]), sum(halves[1]), halves[2][0], halves[3][0]]
        for one, expected in zip(ours, of_norm, strict=True):
            torch.testing.assert_close(one, expected[0], rtol=1e-5, atol=1e-5)
    # A level of one pixel in all is its mean, and its running variance has a share of 0.
    for result in results:
        torch.testing.assert_close(result[5][2], norms[3][2] * (1 - MOMENTUM))
    torch.testing.assert_close(results[0][0][605], norms[1][2].relu(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_check_at_first_use_finds_what_is_wrong(emulated, monkeypatch, caplog, dtype):
    device, tolerance = torch.device("cpu"), level_norm_cuda.TOLERANCE[dtype]
    found = level_norm_cuda.errors_of(device, dtype)
    assert len(found) == 7 and 0 < max(found.values()) <= tolerance / 4
    monkeypatch.setattr(level_norm_cuda, "TOLERANCE", {dtype: max(found.values()) / 2})
    with torch.inference_mode(dtype == BF16):
        problem = level_norm_cuda._problem(device, dtype)
    assert "differs from PyTorch's by" in problem
    assert "The norm of levels does not use its CUDA kernels:" in caplog.text


def test_defaults_do_not_change_the_check(emulated, other_defaults):
    errors = level_norm_cuda.errors_of(torch.device("cpu"), BF16)
    assert max(errors.values()) <= level_norm_cuda.TOLERANCE[BF16]


def test_what_the_kernels_do_not_take():
    assert why_not(torch.empty(3, 8), (3,)) == "they take CUDA tensors, not cpu"
    # meta tensors stand for those of a GPU, whose type is asked first
    assert why_not(torch.empty(3, 8, device="meta"), (3,)) == "they take CUDA tensors, not meta"
    assert why_not_like(BF16, (10, 2048), 8) is None
    assert why_not_like(torch.float64, (10, 8), 1) == (
        "they take float32, bfloat16 and float16, not torch.float64"
    )
    for channels in (0, 12, 2056):
        assert why_not_like(BF16, (10, channels), 1) == (
            f"they take multiples of 8 channels up to 2048, not {channels}"
        )
    assert why_not_like(BF16, (2**31, 8), 1) == (
        "they take a matrix of less than 2^31 pixels, not (2147483648, 8)"
    )
    assert why_not_like(BF16, (9, 8), 9) == "they take up to 8 levels, not 9"


def test_what_does_not_fit_is_told(emulated):
    pixels, x, norms, _ = make((8, (6, 1, 2)), F32)

    def told(pixels, message, norms=norms):
        with pytest.raises(ValueError) as error:
            normalize(x, pixels, *norms, MOMENTUM, EPS)
        assert str(error.value) == message

    told(
        pixels,
        "Expected more than 1 value per channel when training, got 1 at index 1 of pixels "
        "(6, 1, 2).",
    )
    told((6, 2), "pixels must be numbers of pixels of levels, 9 in all, got (6, 2).")
    told((5, 4), "weight must be given for each of 2 levels, got 3.")
    narrow = [norms[0], [t.bfloat16() for t in norms[1]], *norms[2:]]
    message = "bias of a level must be float32, contiguous, of shape (8,) and on cpu, got {}."
    told((4, 3, 2), message.format("torch.bfloat16 of shape (8,) on cpu"), narrow)
    elsewhere = [norms[0], [t.to("meta") for t in norms[1]], *norms[2:]]
    told((4, 3, 2), message.format("torch.float32 of shape (8,) on meta"), elsewhere)
    with pytest.raises(ValueError, match=r"^scales must be of shape \(2, 8\), got \(3, 8\).$"):
        apply(x, (5, 4), torch.stack(norms[0]), torch.stack(norms[1]))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(
    "architecture,dtype,kernels",
    [
        ("sm_80", FP16, ("moments", "parameters")),
        ("sm_90", BF16, ("moments", "finish", "apply", "sums", "gradient")),
        ("sm_100", F32, ("sums", "gradient")),
    ],
)
def test_kernels_compile_within_limits(architecture, dtype, kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Of 256 threads, with which three or four blocks fit an SM, or two for float32.
    most = {"moments": 80, "sums": 80, "gradient": 80} if dtype != F32 else {}
    few = {"apply": 64, "finish": 80, "parameters": 80}
    for kernel in kernels:
        compiled = compile_kernel(header_of(kernel), kernel_name(kernel, dtype), architecture)
        assert compiled.resources.spill_bytes == 0
        assert compiled.resources.registers <= {**most, **few}.get(kernel, 112)
