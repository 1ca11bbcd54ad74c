"""The CUDA kernels against the reference, on a CPU that emulates the warps of a GPU.

Their source is compiled for the CPU with tests/ops/cuda_emulation/warp.cuh in place of the one that
has the GPU's instructions.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sasa_det.ops import local_attention, loop
from sasa_det.ops.cuda_compiler import SOURCES
from sasa_det.ops.cuda_kernels import THREADS, Variant, forward_launch, pixel_stride

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

EMULATION = Path(__file__).parent / "cuda_emulation"
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 1e-2, FP16: 2e-3}

# All widths in both types, all windows, both borders, with and without content and position.
VARIANTS = {
    "8": Variant(BF16, 8, 7),
    "16": Variant(BF16, 16, 5, mask=False),
    "32": Variant(BF16, 32, 7),
    "64": Variant(BF16, 64, 7),
    "8-half": Variant(FP16, 8, 3, mask=False),
    "16-half": Variant(FP16, 16, 7),
    "32-half": Variant(FP16, 32, 7, mask=False),
    "64-half": Variant(FP16, 64, 5),
    "position": Variant(BF16, 32, 7, content=False),
    "content": Variant(FP16, 16, 7, position=False),
    "one": Variant(BF16, 16, 1, mask=False),
}


class Range(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_ulonglong),
        ("written", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels of all variants, compiled for this CPU."""
    folder = tmp_path_factory.mktemp("emulation")
    kernels = [variant.name("local_attention_forward") for variant in VARIANTS.values()]
    cases = [
        f"    case {i}:\n"
        f"      kernel = [=] {{ {name}(*static_cast<const ForwardArguments*>(x)); }};\n"
        "      break;"
        for i, name in enumerate(kernels)
    ]
    source = folder / "kernels.cpp"
    source.write_text(
        "#include <local_attention_forward.cuh>\n"
        "#include <launch.h>\n"
        'extern "C" const char* run(int which, const void* x, const int* grid, int threads,\n'
        "    int shared_bytes, const emulation::Range* ranges, int count, int skipped, u32 seed,\n"
        "    int* facts) {\n"
        "  std::function<void()> kernel;\n"
        "  switch (which) {\n" + "\n".join(cases) + "\n  }\n"
        "  return emulation::run(kernel, grid, threads, shared_bytes, ranges, count, skipped, seed,"
        " facts);\n"
        "}\n"
    )
    built = folder / "kernels.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{EMULATION}", f"-I{SOURCES}"]
    done = subprocess.run(
        [*command, source, "-o", built], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:3000]
    library = ctypes.CDLL(str(built))
    library.run.restype = ctypes.c_char_p
    return library


def run(library, case, launch, tensors, results, skipped=-1, seed=0):
    """Run a kernel; return what is wrong, bank conflicts, and barriers of a thread."""
    tensors = [x for x in tensors if x is not None]
    ranges = (Range * (len(tensors) + len(results)))(
        *(Range(*memory(x), 0) for x in tensors), *(Range(*memory(x), 1) for x in results)
    )
    facts = (ctypes.c_int * 2)()
    message = library.run(
        list(VARIANTS).index(case),
        ctypes.byref(launch.arguments),
        (ctypes.c_int * 3)(*launch.grid),
        THREADS,
        launch.shared_bytes,
        ranges,
        len(ranges),
        skipped,
        seed,
        facts,
    )
    return message.decode(), *facts


def memory(x):
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def make(variant, batch, heads, height, width, seed=0):
    """Make query, key and value as slices of one tensor, and embeddings."""
    generator = torch.Generator().manual_seed(seed)
    channels = heads * variant.head_width
    joined = torch.randn(batch, height, width, 3 * channels, generator=generator)
    query, key, value = joined.to(variant.dtype).split(channels, -1)
    shape = (heads, variant.head_width // 2, variant.kernel_size)
    rows, cols = (torch.randn(shape, generator=generator) for _ in range(2))
    if not variant.position:
        rows = cols = None
    return [query, key if variant.content else None, value, rows, cols]


def forward(library, case, inputs, **options):
    """Run the forward kernel of a variant; return output and log-sum-exp."""
    variant, query = VARIANTS[case], inputs[0]
    batch, height, width, channels = query.shape
    heads = channels // variant.head_width
    output = torch.full(query.shape, math.nan, dtype=variant.dtype)
    log_sum = torch.full((batch, heads, height, width), math.nan)
    launch = forward_launch(variant, *inputs, output, log_sum)
    message, conflicts, barriers = run(library, case, launch, inputs, [output, log_sum], **options)
    assert message == ""
    assert conflicts == 0
    return output, log_sum, barriers


def channels_first(x):
    return None if x is None else x.permute(0, 3, 1, 2).double()


def arguments(variant, inputs):
    """Make what the reference takes, in float64."""
    query, key, value, rows, cols = inputs
    images = [channels_first(x) for x in (query, key, value)]
    embeddings = [None if x is None else x.double() for x in (rows, cols)]
    return [*images, *embeddings], query.shape[3] // variant.head_width


def expected_of(variant, inputs):
    """Return the reference's output, and the log-sum-exp."""
    exact, heads = arguments(variant, inputs)
    options = {"kernel_size": variant.kernel_size, "num_heads": heads}
    border = "mask" if variant.mask else "zero"
    output = local_attention(
        *exact, **options, border=border, content=variant.content, backend="reference"
    )
    _, log_sum = loop.forward(*exact, *options.values(), variant.mask)
    return output.permute(0, 2, 3, 1), log_sum


def error_of(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


# Several tiles in both directions, parts of tiles and of groups of heads, batches; and one pixel.
@pytest.mark.parametrize(
    "case,batch,heads,height,width",
    [
        ("8", 1, 5, 10, 17),
        ("16", 1, 3, 9, 17),
        ("32", 2, 2, 9, 21),
        ("32", 1, 1, 1, 1),
        ("64", 1, 2, 3, 17),
        ("8-half", 2, 2, 5, 3),
        ("16-half", 1, 2, 9, 5),
        ("32-half", 1, 1, 9, 17),
        ("64-half", 1, 1, 10, 9),
        ("position", 1, 1, 9, 17),
        ("content", 1, 2, 9, 17),
        ("one", 1, 2, 9, 17),
    ],
)
def test_forward_equals_the_reference(library, case, batch, heads, height, width):
    variant = VARIANTS[case]
    inputs = make(variant, batch, heads, height, width)
    output, log_sum, _ = forward(library, case, inputs)
    expected, expected_log_sum = expected_of(variant, inputs)
    assert error_of(output, expected) <= TOLERANCE[variant.dtype]
    assert error_of(log_sum, expected_log_sum) <= 1e-4


@pytest.mark.parametrize("case", ["8", "32"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_window(library, case, index):
    variant = VARIANTS[case]
    inputs = make(variant, 1, 1, 10, 13)
    inputs[index][0, 4, 7, 1] = math.inf if index == 1 else math.nan
    if index == 2:
        inputs[index][0, 6, 3, 2] = -math.inf
    output, _, _ = forward(library, case, inputs)
    expected, _ = expected_of(variant, inputs)
    assert expected.isnan().any() and expected.isfinite().any()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.03, equal_nan=True)


def test_large_logits_do_not_overflow(library):
    variant = VARIANTS["32"]
    inputs = [1e4 * x for x in make(variant, 1, 1, 4, 5)]
    output, _, _ = forward(library, "32", inputs)
    assert error_of(output, expected_of(variant, inputs)[0]) <= TOLERANCE[BF16]


def test_without_a_barrier_it_is_wrong(library):
    inputs = make(VARIANTS["32"], 1, 1, 8, 16)
    expected, _ = expected_of(VARIANTS["32"], inputs)
    *_, barriers = forward(library, "32", inputs)
    assert barriers > 0
    for barrier in range(barriers):
        output, *_ = forward(library, "32", inputs, skipped=barrier)
        assert not error_of(output, expected) <= TOLERANCE[BF16]


def test_every_order_of_threads_gives_the_same_bits(library):
    inputs = make(VARIANTS["8"], 1, 4, 8, 16)
    first, second = (forward(library, "8", inputs, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(first, second)


def test_the_emulation_finds_reads_outside_of_tensors(library):
    inputs = make(VARIANTS["32"], 1, 1, 8, 16)
    output, log_sum = torch.empty(inputs[0].shape, dtype=BF16), torch.empty(1, 1, 8, 16)
    launch = forward_launch(VARIANTS["32"], *inputs, output, log_sum)
    launch.arguments.height = 9
    message, *_ = run(library, "32", launch, inputs, [output, log_sum])
    assert message.startswith(("a read outside of the tensors", "a write outside of the results"))


def test_strides_of_pixels():
    joined = torch.zeros(2, 5, 6, 96)
    assert pixel_stride(joined) == 96
    assert pixel_stride(joined[..., 32:64]) == 96
    assert pixel_stride(joined[:1, :, :1]) == 6 * 96  # where images, and rows, are one pixel wide
    assert pixel_stride(torch.zeros(2, 32, 5, 6).permute(0, 2, 3, 1)) is None
    assert pixel_stride(joined[:, :, :5]) is None  # a gap after each row
    assert pixel_stride(joined[:, ::2]) is None
    assert pixel_stride(joined[..., 1:33]) is None  # 4 bytes off
    assert pixel_stride(torch.zeros(2, 5, 6, 12)) is None  # the second pixel is not aligned
