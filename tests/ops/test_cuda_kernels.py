"""The CUDA kernels against the reference, on a CPU that emulates the warps of a GPU."""

import collections
import copy
import inspect
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_det.benchmark import gpu_checks
from sasa_det.benchmark.gpu_choices import make_launch
from sasa_det.layers import LocalSelfAttention2d, joined
from sasa_det.layers.joined import is_joined
from sasa_det.layers.one_piece import projections
from sasa_det.ops import cuda, cuda_check, cuda_layer, local_attention, loop
from sasa_det.ops.cuda_kernels import (
    EMBEDDINGS_HEADER,
    KERNELS,
    Maps,
    Split,
    Variant,
    choices_of,
    embedding_sums_shape,
    embeddings_name,
    launch_of,
    launch_of_embeddings,
    pixel_stride,
)
from sasa_det.ops.pooling import avg_pool_rounding_up
from sasa_det.ops.structures import pointers_of

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
    "8-pooled": Variant(BF16, 8, 7, pooled=True),
    "16-pooled": Variant(FP16, 16, 5, mask=False, pooled=True),
    "32-pooled": Variant(BF16, 32, 7, pooled=True),
    "64-pooled": Variant(BF16, 64, 7, pooled=True),
    # The others have two parts of 16 pixels for a warp.
    "8-part": Variant(BF16, 8, 7, split=Split(1, 2)),
    "32-part": Variant(FP16, 32, 5, split=Split(1, 2)),
    "64-part": Variant(BF16, 64, 7, pooled=True, split=Split(1, 2)),
}


@pytest.fixture(scope="module")
def library(emulate_kernels):
    """All kernels of all variants, see conftest.py."""
    headers = [*(kernel.header for kernel in KERNELS.values()), EMBEDDINGS_HEADER]
    return emulate_kernels(headers, kernels_of_library())


def kernels_of_library():
    """Return the names of the library's kernels, and the structures that they take."""
    structures = ("ForwardArguments", "QueryArguments", "KeyArguments")
    kernels = {
        variant.name(kernel): structure
        for kernel, structure in zip(KERNELS, structures, strict=True)
        for variant in VARIANTS.values()
    }
    positions = [variant for variant in VARIANTS.values() if variant.position]
    return {**kernels, **dict.fromkeys(map(embeddings_name, positions), "EmbeddingArguments")}


def run(library, kernel, case, tensors, results, skipped=-1, seed=0, height=None):
    """Run a kernel; return what is wrong, "" if nothing, and the number of a thread's barriers."""
    launch = launch_of(kernel, VARIANTS[case], **tensors, **results)
    if height is not None:
        launch.arguments.sizes.levels[0].height = height
    read, written = ([x for x in xs.values() if x is not None] for xs in (tensors, results))
    return library.start(launch, read, written, skipped, seed)


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


NAMES = ("query", "key", "value", "rel_rows", "rel_cols")


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype)


def forward(library, case, inputs, **options):
    """Run the forward kernel of a variant; return output, log-sum-exp and number of barriers."""
    variant, query = VARIANTS[case], inputs[0]
    batch, height, width, channels = query.shape
    heads = channels // variant.head_width
    results = {
        "output": nan(*output_shape(variant, inputs), dtype=variant.dtype),
        "log_sum": nan(batch, heads, height, width),
    }
    tensors = dict(zip(NAMES, inputs, strict=True))
    message, barriers = run(library, "local_attention_forward", case, tensors, results, **options)
    assert message == ""
    return *results.values(), barriers


def output_shape(variant, inputs):
    batch, height, width, channels = inputs[0].shape
    if variant.pooled:
        height, width = -(-height // 2), -(-width // 2)
    return batch, height, width, channels


def as_squares(grad, height, width):
    """Double the gradients of squares of which half is outside, as csrc/gpu_layer.cpp does."""
    grad = grad.clone()
    if height % 2:
        grad[:, -1] *= 2
    if width % 2:
        grad[:, :, -1] *= 2
    return grad


def backward(library, case, inputs, grad, log_sum, **options):
    """Run both kernels of the backward pass; return the gradients and the numbers of barriers."""
    variant, query = VARIANTS[case], inputs[0]
    if variant.pooled:
        grad = as_squares(grad, *query.shape[1:3])
    tensors = {"grad": grad, **dict(zip(NAMES, inputs, strict=True)), "log_sum": log_sum}
    grad_query, grad_key, grad_value = (nan(*query.shape, dtype=variant.dtype) for _ in range(3))
    results = {"grad_query": grad_query, "minus_mean": nan(*log_sum.shape)}
    results["grad_embeddings"] = sums = nan(*embedding_sums_shape(Maps.of(query), query.shape[3]))
    message, first = run(library, "local_attention_query", case, tensors, results, **options)
    assert message == ""
    tensors["minus_mean"] = results["minus_mean"]
    results = {"grad_key": grad_key if variant.content else None, "grad_value": grad_value}
    message, second = run(library, "local_attention_key", case, tensors, results, **options)
    assert message == ""
    gradients = [grad_query, grad_key, grad_value]
    if variant.position:
        gradients += embedding_gradients(library, variant, sums, inputs[3:])
    present = [x is not None for x in inputs]
    gradients = [x for x, wanted in zip(gradients, present, strict=False) if wanted]
    return gradients, (first, second)


def embedding_gradients(library, variant, sums, embeddings, **options):
    """Run the kernel that adds up the sums of the tiles."""
    rows, cols = (nan(*x.shape) for x in embeddings)
    launch = launch_of_embeddings(variant, sums, rows, cols)
    message, _ = library.start(launch, [sums], [rows, cols], **options)
    assert message == ""
    return rows, cols


def channels_first(x):
    return None if x is None else x.permute(0, 3, 1, 2).double()


def arguments(variant, inputs):
    """Make what the reference takes, in float64."""
    query, key, value, rows, cols = inputs
    images = [channels_first(x) for x in (query, key, value)]
    embeddings = [None if x is None else x.double() for x in (rows, cols)]
    return [*images, *embeddings], query.shape[3] // variant.head_width


def expected_of(variant, inputs):
    """Return the reference's output, and the log-sum-exp to base 2."""
    exact, heads = arguments(variant, inputs)
    options = {"kernel_size": variant.kernel_size, "num_heads": heads}
    border = "mask" if variant.mask else "zero"
    output = local_attention(
        *exact, **options, border=border, content=variant.content, backend="reference"
    )
    _, log_sum = loop.forward(*exact, *options.values(), variant.mask)
    return pooled(variant, output).permute(0, 2, 3, 1), log_sum / math.log(2)


def pooled(variant, output):
    return avg_pool_rounding_up(output, 2) if variant.pooled else output


def expected_gradients(variant, inputs, grad):
    """Return the reference's gradients, of what is not None."""
    exact, heads = arguments(variant, inputs)
    leaves = [None if x is None else x.requires_grad_() for x in exact]
    border = "mask" if variant.mask else "zero"
    output = local_attention(
        *leaves,
        kernel_size=variant.kernel_size,
        num_heads=heads,
        border=border,
        content=variant.content,
        backend="reference",
    )
    present = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(pooled(variant, output), present, channels_first(grad))
    return [x.permute(0, 2, 3, 1) if x.dim() == 4 else x for x in gradients]


def make_grad(inputs, variant=None):
    generator = torch.Generator().manual_seed(1)
    shape = inputs[0].shape if variant is None else output_shape(variant, inputs)
    return torch.randn(shape, generator=generator).to(inputs[0].dtype)


def error_of(actual, expected):
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(error)  # NaN, if one of them is


# Several tiles in both directions, parts of tiles and of groups of heads, batches; and one pixel.
SIZES = pytest.mark.parametrize(
    "case,batch,heads,height,width",
    [
        ("8", 1, 5, 10, 17),
        ("16", 1, 3, 9, 17),
        ("32", 2, 2, 5, 17),
        ("32", 1, 1, 1, 1),
        ("64", 1, 2, 3, 17),
        ("8-half", 2, 2, 5, 3),
        ("16-half", 1, 2, 9, 5),
        ("32-half", 1, 1, 9, 17),
        ("64-half", 1, 1, 10, 9),
        ("position", 1, 1, 9, 17),
        ("content", 1, 2, 9, 17),
        ("one", 1, 2, 9, 17),
        ("16-pooled", 2, 3, 9, 6),
        ("8-pooled", 1, 5, 9, 18),
        ("32-pooled", 2, 1, 10, 17),
        ("64-pooled", 2, 1, 5, 19),
        ("8-part", 1, 5, 9, 17),
        ("32-part", 2, 1, 9, 17),
        ("64-part", 1, 1, 5, 19),
    ],
)


@SIZES
def test_forward_equals_the_reference(library, case, batch, heads, height, width):
    variant = VARIANTS[case]
    inputs = make(variant, batch, heads, height, width)
    votes = library.votes
    output, log_sum, _ = forward(library, case, inputs)
    assert library.votes == votes  # no warp takes the long way of what is not finite
    expected, expected_log_sum = expected_of(variant, inputs)
    assert error_of(output, expected) <= TOLERANCE[variant.dtype]
    assert error_of(log_sum, expected_log_sum) <= 1e-4


@pytest.mark.parametrize("case,heads", [("8", 5), ("64", 1)])
def test_levels_in_one_launch_are_the_same_as_each_in_its_own(library, case, heads):
    variant, maps = VARIANTS[case], Maps(2, ((5, 9), (9, 17), (1, 2)))
    channels = heads * variant.head_width
    joined, rows, cols = make_pixels(variant, sum(maps.pixels), heads)
    grad = torch.randn(sum(maps.pixels), channels).to(variant.dtype)
    names = ("output", "grad_query", "grad_key", "grad_value")
    images = {name: nan(*grad.shape, dtype=variant.dtype) for name in names}
    planes = {name: nan(sum(maps.pixels) * heads) for name in ("log_sum", "minus_mean")}
    sums = {"grad_embeddings": nan(*embedding_sums_shape(maps, channels))}
    inputs = dict(zip(NAMES, (*joined.split(channels, 1), rows, cols), strict=True))
    start_all(library, case, maps, {**inputs, "grad": grad}, {**images, **planes, **sums})
    of_levels, first = [], 0
    for (height, width), count in zip(maps.sizes, maps.pixels, strict=True):
        part = slice(first, first + count)
        first += count
        shape = (maps.batch, height, width, channels)
        level = {name: x if x.dim() == 3 else x[part].view(shape) for name, x in inputs.items()}
        output, log_sum, _ = forward(library, case, list(level.values()))
        grads, _ = backward(library, case, list(level.values()), grad[part].view(shape), log_sum)
        for name, alone in zip(names, (output, *grads), strict=False):
            assert torch.equal(images[name][part].view(shape), alone)
        plane = planes["log_sum"][part.start * heads : part.stop * heads]
        assert torch.equal(plane.view(log_sum.shape), log_sum)
        of_levels.append(grads[3:])
    together = embedding_gradients(library, variant, sums["grad_embeddings"], (rows, cols))
    for x, alone in zip(together, zip(*of_levels, strict=True), strict=True):
        assert error_of(x, sum(map(torch.Tensor.double, alone))) <= 1e-6


def make_pixels(variant, pixels, heads):
    """Make (pixels, 3 C) of queries, keys and values, and embeddings."""
    query, key, value, rows, cols = make(variant, 1, heads, 1, pixels)
    return torch.cat([query, key, value], 3)[0, 0], rows, cols


def start_all(library, case, maps, tensors, results):
    """Run the three kernels on the maps of several levels."""
    for kernel, facts in KERNELS.items():
        names = pointers_of(facts.arguments)
        known = {**tensors, **results}
        launch = launch_of(kernel, VARIANTS[case], maps, **{name: known[name] for name in names})
        message, _ = library.start(launch, list(known.values()), list(results.values()))
        assert message == ""


def test_forward_equals_a_formulation_without_embeddings(library):
    # Heads of q and [q.r of the row offset that keys in rows m, modulo 7, are at, for each m; the
    # same for columns], and of k and [1 in place of the key's row, 1 in place of its column].
    variant = VARIANTS["32"]
    inputs = make(variant, 1, 1, 9, 17)
    query, key, value, rows, cols = arguments(variant, inputs)[0]
    size, half = variant.kernel_size, variant.head_width // 2
    y, x = torch.meshgrid(torch.arange(9), torch.arange(17), indexing="ij")
    class_of = torch.arange(size).view(-1, 1, 1)
    queries, keys = [query], [key]
    for line, embedding, channels in ((y, rows, query[:, :half]), (x, cols, query[:, half:])):
        terms = torch.einsum("ndyx,dk->nkyx", channels, embedding[0])
        queries.append(terms.gather(1, ((class_of - line + size // 2) % size)[None]))
        keys.append((line % size == class_of)[None].double())
    values = torch.cat([value, value.new_zeros(1, 2 * size, 9, 17)], 1)
    expected = local_attention(
        *(torch.cat(x, 1) for x in (queries, keys)),
        *(values, None, None),
        kernel_size=size,
        num_heads=1,
        backend="loop",
    )
    output, *_ = forward(library, "32", inputs)
    expected = expected[:, : variant.head_width].permute(0, 2, 3, 1)
    assert error_of(output, expected) <= TOLERANCE[BF16]
    assert error_of(expected_of(variant, inputs)[0], expected) <= 1e-12


@SIZES
def test_gradients_equal_the_reference(library, case, batch, heads, height, width):
    variant = VARIANTS[case]
    inputs = make(variant, batch, heads, height, width)
    grad = make_grad(inputs, variant)
    _, log_sum = expected_of(variant, inputs)
    votes = library.votes
    actual, _ = backward(library, case, inputs, grad, log_sum.float())
    assert library.votes == votes
    expected = expected_gradients(variant, inputs, grad)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.shape == exact.shape
        assert error_of(ours, exact) <= TOLERANCE[variant.dtype]


def assert_same_where_finite(ours, exact, variant):
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert error_of(ours[finite], exact[finite]) <= TOLERANCE[variant.dtype]


@pytest.mark.parametrize("case", ["8", "32", "8-pooled", "16-pooled", "64-pooled"])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
def test_what_is_not_finite_stays_in_its_window(library, case, name):
    variant = VARIANTS[case]
    inputs = make(variant, 1, 1, 10, 13)
    grad = make_grad(inputs, variant)
    spoiled = {**dict(zip(NAMES, inputs, strict=True)), "grad": grad}[name]
    row, col = (2, 3) if spoiled.shape != inputs[0].shape else (4, 7)  # of squares
    spoiled[0, row, col, 1] = math.inf if name == "key" else math.nan
    if name == "value":
        spoiled[0, 9, 1, 2] = -math.inf
    output, log_sum, _ = forward(library, case, inputs)
    actual, _ = backward(library, case, inputs, grad, log_sum)
    expected, _ = expected_of(variant, inputs)
    gradients = expected_gradients(variant, inputs, grad)
    assert expected.isnan().any() == (name != "grad")
    # Embeddings are seen by all windows: all of their gradients are NaN.
    for ours, exact in zip((output, *actual[:3]), (expected, *gradients[:3]), strict=True):
        assert exact.isfinite().any()
        assert_same_where_finite(ours, exact, variant)


@pytest.mark.parametrize("case", ["8", "32"])
def test_windows_whose_logits_are_all_minus_infinity_are_nan(library, case):
    variant = VARIANTS[case]
    inputs = make(variant, 1, 1, 9, 14)
    query, key = inputs[:2]
    query[..., 0] = query[..., 0].abs() + 1
    key[:, :, :7, 0] = -math.inf  # the windows of the first four columns, and no more
    grad = make_grad(inputs, variant)
    output, log_sum, _ = forward(library, case, inputs)
    actual, _ = backward(library, case, inputs, grad, log_sum)
    expected, _ = expected_of(variant, inputs)
    assert expected[:, :, :4].isnan().all() and expected[:, :, 4:].isfinite().any()
    gradients = expected_gradients(variant, inputs, grad)[:3]
    for ours, exact in zip((output, *actual[:3]), (expected, *gradients), strict=True):
        assert_same_where_finite(ours, exact, variant)


def test_results_whose_products_are_infinite_are_right(library):
    # Products of two are collected, to find out whether one of them is not finite.
    variant = VARIANTS["32"]
    inputs = make(variant, 1, 1, 5, 9)
    inputs[2] = (inputs[2] * 1e25).to(BF16)
    grad, votes = make_grad(inputs), library.votes
    output, log_sum, _ = forward(library, "32", inputs)
    actual, _ = backward(library, "32", inputs, grad, log_sum)
    assert library.votes > votes  # for the long way of what is not finite
    expected = (expected_of(variant, inputs)[0], *expected_gradients(variant, inputs, grad))
    for ours, exact in zip((output, *actual), expected, strict=True):
        assert error_of(ours, exact) <= TOLERANCE[BF16]


def test_values_far_from_zero_do_not_spoil_gradients(library):
    # g.v is large then, and all but the same over a window.
    variant = VARIANTS["32"]
    inputs = make(variant, 1, 1, 5, 9)
    inputs[2] = (inputs[2] + 100).to(BF16)
    grad = make_grad(inputs)
    _, log_sum, _ = forward(library, "32", inputs)
    actual, _ = backward(library, "32", inputs, grad, log_sum)
    for ours, exact in zip(actual, expected_gradients(variant, inputs, grad), strict=True):
        assert error_of(ours, exact) <= TOLERANCE[BF16]


def test_large_logits_do_not_overflow(library):
    variant = VARIANTS["32"]
    inputs = [1e4 * x for x in make(variant, 1, 1, 4, 5)]
    output, log_sum, _ = forward(library, "32", inputs)
    assert error_of(output, expected_of(variant, inputs)[0]) <= TOLERANCE[BF16]
    actual, _ = backward(library, "32", inputs, make_grad(inputs), log_sum)
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("case,heads,of_query", [("32", 1, 2), ("16-half", 2, 2), ("64", 1, 3)])
def test_without_a_barrier_it_is_wrong(library, case, heads, of_query):
    inputs = make(VARIANTS[case], 1, heads, 8, 16)
    grad = make_grad(inputs)
    output, log_sum, barriers = forward(library, case, inputs)
    right, (first, second) = backward(library, case, inputs, grad, log_sum)
    assert barriers == 1 and first == of_query and second == 2 * heads
    for barrier in range(barriers):
        wrong, *_ = forward(library, case, inputs, skipped=barrier)
        assert not torch.equal(wrong, output)
    for barrier in range(max(first, second)):
        wrong, _ = backward(library, case, inputs, grad, log_sum, skipped=barrier)
        equal = [torch.equal(a, b) for a, b in zip(wrong, right, strict=True)]
        # The first kernel makes the gradients of queries and embeddings, the second the others.
        assert barrier >= first or not all(equal[:1] + equal[3:])
        assert barrier >= second or not all(equal[1:3])


@pytest.mark.parametrize("case,channels", [("8", 24), ("32", 64)])
def test_sums_of_tiles_are_added_up(library, case, channels):
    variant = VARIANTS[case]
    half = variant.head_width // 2
    sums = torch.randn(70, channels, 8, generator=torch.Generator().manual_seed(0))
    embeddings = [torch.empty(channels // half // 2, half, 7) for _ in range(2)]
    rows, cols = embedding_gradients(library, variant, sums, embeddings)
    expected = sums.double().sum(0).view(-1, 2, half, 8)[..., :7]
    assert error_of(rows, expected[:, 0]) <= 1e-6 and error_of(cols, expected[:, 1]) <= 1e-6
    wrong, _ = embedding_gradients(library, variant, sums, embeddings, skipped=0)
    assert not torch.equal(wrong, rows)


def test_every_order_of_threads_gives_the_same_bits(library):
    inputs = make(VARIANTS["8"], 1, 4, 9, 5)
    grad = make_grad(inputs)
    runs = []
    for seed in (1, 2):
        output, log_sum, _ = forward(library, "8", inputs, seed=seed)
        gradients, _ = backward(library, "8", inputs, grad, log_sum, seed=seed)
        runs.append([output, log_sum, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_emulation_finds_reads_outside_of_tensors(library):
    inputs = make(VARIANTS["32"], 1, 1, 8, 16)
    tensors = dict(zip(NAMES, inputs, strict=True))
    results = {"output": nan(1, 8, 16, 32, dtype=BF16), "log_sum": nan(1, 1, 8, 16)}
    message, _ = run(library, "local_attention_forward", "32", tensors, results, height=9)
    assert message.startswith("a read outside of the tensors")


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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_width", [8, 64])
def test_what_is_timed_alone_is_a_launch_that_works(library, emulated, kernel, head_width):
    first, *_ = choices_of(kernel, head_width)
    run = make_launch(kernel, first, 2, 1, 9, "cpu")
    votes = library.votes
    results = run()
    assert emulated == [kernel] and library.votes == votes
    assert all(x.isfinite().all() and x.any() for x in results)
    if kernel == "local_attention_forward":
        inputs = inspect.getclosurevars(run).nonlocals["tensors"]
        names = ("query", "key", "value", "rel_rows", "rel_cols")
        output, log_sum = expected_of(first, [inputs[name] for name in names])
        assert error_of(results[0], output) <= TOLERANCE[BF16]
        assert error_of(results[1], log_sum) <= 1e-4


@pytest.mark.parametrize("layout", ["slices", "channels last", "channels first"])
@pytest.mark.parametrize("case", ["32", "position", "content"])
def test_the_backend_takes_every_layout(emulated, case, layout):
    variant = VARIANTS[case]
    query, key, value, rows, cols = make(variant, 2, 2, 5, 6)
    inputs = [None if x is None else x.permute(0, 3, 1, 2) for x in (query, key, value)]
    formats = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
    if layout in formats:
        inputs = [
            None if x is None else x.contiguous(memory_format=formats[layout]) for x in inputs
        ]
    else:
        assert all(
            cuda._channels_last(x).data_ptr() == x.data_ptr() for x in inputs if x is not None
        )
    inputs = [None if x is None else x.detach().requires_grad_() for x in (*inputs, rows, cols)]
    options = {"kernel_size": variant.kernel_size, "num_heads": 2, "content": variant.content}
    present = [x for x in inputs if x is not None]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    results = []
    for backend, dtype in (("cuda", variant.dtype), ("reference", torch.float64)):
        leaves = iter([x if x.dtype == torch.float32 else x.to(dtype) for x in present])
        arguments = [None if x is None else next(leaves) for x in inputs]
        output = local_attention(*arguments, **options, backend=backend)
        gradients = torch.autograd.grad(output, present, grad.to(output.dtype))
        results.append([output, *gradients])
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert error_of(ours, exact) <= TOLERANCE[variant.dtype]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "options", [{}, {"content": False}, {"scale_logits": True, "stride": 2}], ids=str
)
def test_a_layer_makes_queries_keys_and_values_with_one_product(emulated, options, layout):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(24, 64, num_heads=2, **options)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    layer.to(BF16)
    x = torch.randn(2, 24, 5, 6).to(BF16).to(memory_format=layout).requires_grad_()
    assert is_joined(layer, x)
    with CountedOperators() as counted:
        output = layer(x)
        grad = torch.randn(output.shape).to(BF16).to(memory_format=layout)
        output.backward(grad)
    gradients = [leaf.grad for leaf in (x, *layer.parameters())]
    # One product, and two for its gradients.
    assert counted.numbers["mm"] == 3
    assert counted.numbers["joined_attention"] == counted.numbers["joined_attention_backward"] == 1
    assert counted.numbers["convolution"] == counted.numbers["local_attention"] == 0
    assert output.is_contiguous(memory_format=layout)
    leaf = x.detach().double().requires_grad_()
    expected = exact(leaf)
    leaves = [leaf, *exact.parameters()]
    exact_gradients = torch.autograd.grad(expected, leaves, grad.double())
    for ours, theirs in zip((output, *gradients), (expected, *exact_gradients), strict=True):
        assert ours.shape == theirs.shape
        # Queries, keys and values are rounded too.
        assert error_of(ours.detach(), theirs.detach()) <= 2 * TOLERANCE[BF16]


def make_layer(bias=False, **options):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(24, 64, num_heads=2, **options)
    if bias:
        for projection in projections(layer):
            projection.bias = nn.Parameter(0.1 * torch.randn(64))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"content": False}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_layer_as_one_node_of_autograd(launched, options, bias, layout):
    """As on a GPU, where no operator is seen; weights are float32, as under autocast."""
    layer = make_layer(bias, **options)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    x = torch.randn(2, 24, 5, 6).to(memory_format=layout)
    grad = torch.randn(layer(x).shape).to(memory_format=layout)
    launched.clear()
    results = []
    for run, module in ((partial(joined.attend, layer), layer), (exact, exact)):
        leaf = x.to(module.query.weight.dtype).requires_grad_()
        output = run(leaf)
        leaves = [leaf, *module.parameters()]
        results.append((output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))))
    assert [name.split("<")[0] for name in launched] == [*KERNELS, "local_attention_embeddings"]
    assert results[0][0].dtype == BF16
    assert results[0][0].is_contiguous(memory_format=layout)
    for ours, theirs in zip(*results, strict=True):
        # Gradients of biases are sums of what is rounded, and for keys small differences.
        assert error_of(ours.detach(), theirs.detach()) <= 4 * TOLERANCE[BF16]
    assert {x.dtype for x in results[0][1:]} == {torch.float32}


def copies_of_maps(run, smallest):
    """Return the operators within ``run`` that copy tensors of ``smallest`` elements or more."""
    with torch.profiler.profile(record_shapes=True) as recorded:
        run()
    return [
        (event.name, event.input_shapes)
        for event in recorded.events()
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and math.prod(event.input_shapes[0]) >= smallest
    ]


def test_a_layer_as_one_node_copies_no_map(launched):
    layer = make_layer().to(BF16)
    make = partial(torch.randn, 2, 24, 16, 12, dtype=BF16)
    x = make().to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(layer(x).detach())
    assert grad.is_contiguous(memory_format=torch.channels_last)
    leaves = [x, *layer.parameters()]

    def step(x, grad):
        torch.autograd.grad(joined.attend(layer, x), leaves, grad)

    assert copies_of_maps(partial(step, x, grad), x.numel()) == []
    # It is seen where there is one.
    assert copies_of_maps(partial(step, x, grad.contiguous()), x.numel()) != []


@pytest.mark.parametrize("frozen", ["input", "embeddings", "weights", "all but biases"])
def test_a_node_gives_the_gradients_that_are_wanted(launched, frozen):
    """They are those that it gives where all are."""
    layer = make_layer(bias=True)
    x = torch.randn(2, 24, 5, 6).requires_grad_()
    leaves = {"input": x, **dict(layer.named_parameters())}
    joined.attend(layer, x).float().square().sum().backward()
    whole = {name: leaf.grad for name, leaf in leaves.items()}
    fixed = {
        "input": ["input"],
        "embeddings": ["rel_rows", "rel_cols"],
        "weights": [name for name in leaves if name.endswith(".weight")],
        "all but biases": [name for name in leaves if not name.endswith(".bias")],
    }[frozen]
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name not in fixed)
    joined.attend(layer, x).float().square().sum().backward()
    for name, leaf in leaves.items():
        if name in fixed:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=0, atol=0)


def test_a_node_without_gradients_and_of_no_images(launched):
    layer = make_layer(content=False)
    x = torch.randn(2, 24, 5, 6)
    with torch.no_grad():
        output = joined.attend(layer, x)
    trained = joined.attend(layer, x)
    assert trained.requires_grad and not output.requires_grad
    torch.testing.assert_close(trained.detach(), output, rtol=0, atol=0)
    assert len(launched) == 2
    layer = make_layer()
    empty = joined.attend(layer, x[:0])
    assert empty.shape == (0, 64, 5, 6) and len(launched) == 2
    gradients = torch.autograd.grad(empty.sum(), list(layer.parameters()))
    assert len(launched) == 2 and not any(map(torch.any, gradients))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_an_input_that_is_changed_before_the_backward_pass_is_an_error(launched, layout):
    layer = make_layer().to(BF16)
    images = torch.randn(1, 24, 3, 4, dtype=BF16).to(memory_format=layout).requires_grad_()
    x = images.relu()
    y = joined.attend(layer, x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()
    # A copy of another type is not changed.
    x = images.float()
    y = joined.attend(layer, x)
    x.mul_(2)
    y.float().sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_there_is_no_node_in_inference_mode(launched):
    layer, x = make_layer(), torch.randn(1, 24, 3, 4)
    with torch.inference_mode():
        expected = joined.attend(layer, x)
        with torch.enable_grad():
            found = joined.attend(layer, x.clone())
    assert torch.equal(found, expected) and not found.requires_grad


def test_the_first_pass_loads_the_kernels_of_the_backward_pass_too(launched, monkeypatch):
    """In the capture of a step as a CUDA graph, nothing can be loaded."""
    layer, x = make_layer(), torch.randn(1, 24, 3, 4)
    with torch.no_grad():
        joined.attend(layer, x)
    monkeypatch.setattr(cuda_layer, "function_of", pytest.fail)
    joined.attend(layer, x).float().sum().backward()
    assert layer.query.weight.grad.any()


def test_a_node_is_not_differentiated_twice(launched):
    x = torch.randn(1, 24, 3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(joined.attend(make_layer(), x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_a_kernel_that_does_not_start_is_an_error(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with CUDA_ERROR 700"):
        joined.attend(make_layer(), torch.randn(1, 24, 3, 4))


class CountedOperators(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.numbers = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.numbers[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_layers_that_are_more_than_their_weights_are_called(emulated):
    x = torch.randn(1, 24, 3, 4).to(BF16)

    def takes(change=lambda layer: None, **options):
        layer = LocalSelfAttention2d(24, 64, num_heads=2, **options).to(BF16)
        change(layer)
        return is_joined(layer, x)

    assert takes() and takes(position="none")
    assert not takes(position="absolute") and not takes(qk_norm="RMS")
    assert not takes(backend="loop")
    assert not takes(lambda layer: layer.key.register_forward_hook(lambda *_: None))
    assert not takes(lambda layer: layer.query.register_parameter("bias", nn.Parameter(x[0, 0])))


def test_an_empty_batch_goes_through(emulated):
    variant = VARIANTS["32"]
    inputs = [x.permute(0, 3, 1, 2)[:0] if x.dim() == 4 else x for x in make(variant, 1, 1, 5, 6)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = local_attention(*inputs, kernel_size=7, num_heads=1, backend="cuda")
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert output.shape == (0, 32, 5, 6)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert not gradients[3].any() and not gradients[4].any()


def test_operator_passes_opcheck(emulated):
    inputs = make(VARIANTS["8-half"], 1, 1, 3, 4)
    inputs = [x.permute(0, 3, 1, 2) if x.dim() == 4 else x for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    operator = torch.ops.sasa_det.local_attention.default
    torch.library.opcheck(operator, (*inputs, 3, 1, False, "cuda"))


@pytest.mark.parametrize("case", ["8-half", "position"])
def test_operator_of_slices_passes_opcheck(emulated, case):
    variant = VARIANTS[case]
    *images, rows, cols = make(variant, 2, 1, 3, 4)
    joined = torch.cat([x for x in images if x is not None], -1).permute(0, 3, 1, 2)
    tensors = [x.detach().requires_grad_() for x in (joined, rows, cols)]
    options = (variant.kernel_size, 1, variant.content, variant.mask)
    torch.library.opcheck(torch.ops.sasa_det.joined_attention.default, (*tensors, *options))


@pytest.mark.parametrize("index,factor", [(None, 1), (0, 1.1), (3, 1.1)])
def test_the_check_at_first_use_finds_what_is_wrong(emulated, monkeypatch, index, factor):
    right = cuda.backward

    def wrong(*arguments):
        gradients = list(right(*arguments))
        if index is not None:
            gradients[index] = factor * gradients[index]
        return gradients

    monkeypatch.setattr(cuda, "backward", wrong)
    verdict = cuda_check.verdict_of(VARIANTS["8-half"], torch.device("cpu"))
    assert set(verdict.errors) == set(cuda_check.RESULTS)
    if index is None:
        assert verdict.problem is None
        assert max(verdict.errors.values()) <= TOLERANCE[FP16]
    else:
        name = {0: "grad_query", 3: "grad_rel_rows"}[index]
        assert verdict.errors[name] > 0.09
        assert verdict.problem.startswith(f"{name} differs from the loop backend's by ")


@pytest.mark.parametrize("case", ["position", "32-pooled"])
def test_the_check_at_first_use_starts_layers_too(launched, monkeypatch, case):
    verdict = cuda_check.verdict_of(VARIANTS[case], torch.device("cpu"))
    assert verdict.problem is None and verdict.errors[cuda_check.LAYER] > 0
    right = cuda_layer.attend
    monkeypatch.setattr(cuda_layer, "attend", lambda *inputs: 1.1 * right(*inputs))
    verdict = cuda_check.verdict_of(VARIANTS[case], torch.device("cpu"))
    assert verdict.problem.startswith("layer differs from the loop backend's by ")


def test_the_check_at_first_use_sees_other_levels(launched, monkeypatch):
    right = cuda_layer.attend

    def wrong(x, *arguments):
        output = right(x, *arguments)
        return output if x.dim() == 4 else torch.cat([output[:-9], output[-9:] + 1])

    monkeypatch.setattr(cuda_layer, "attend", wrong)
    verdict = cuda_check.verdict_of(VARIANTS["position"], torch.device("cpu"))
    assert verdict.problem.startswith("layer differs from the loop backend's by ")


def test_what_the_report_compares_of_levels(launched, monkeypatch):
    monkeypatch.setattr(gpu_checks, "runs_on_levels", lambda layer, x: True)
    device = torch.device("cpu")
    errors = gpu_checks.errors_of_levels(device)
    assert len(errors) == 11 and max(errors.values()) <= 1e-2
    assert max(error for name, error in errors.items() if "output" in name) == 0
    right = gpu_checks.attend_levels
    monkeypatch.setattr(gpu_checks, "attend_levels", lambda *inputs: 1.1 * right(*inputs))
    ((_, compare),) = [x for x in gpu_checks.checks_parts(device) if x[0] == "levels in one call"]
    (comparison,) = compare()
    assert comparison.error > 0.05
    assert "differs from that of one level after the other by" in comparison.problem


def test_defaults_do_not_change_the_check(launched, other_defaults):
    for case in ("position", "32-pooled"):
        verdict = cuda_check.verdict_of(VARIANTS[case], torch.device("cpu"))
        assert verdict.problem is None and verdict.errors[cuda_check.LAYER] > 0


def test_autocast_does_not_change_the_check(emulated):
    arguments = VARIANTS["8-half"], torch.device("cpu")
    expected = cuda_check.verdict_of(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert cuda_check.verdict_of(*arguments) == expected


def test_sizes_are_counted_with_31_bits():
    assert cuda._why_not_of_size((2**10, 64, 2**9, 2**9), 4) is None
    assert cuda._why_not_of_size((2**10, 64, 2**9, 2**9), 8) == (
        "it does not take 1024 images of 512 x 512 with 8 heads"
    )
    assert "rows of 4194304 pixels" in cuda._why_not_of_size((1, 32, 1, 2**22), 1)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "properties,message",
    [
        ({"major": 7, "minor": 5}, "it takes GPUs of compute capability 8.0 and higher, not 7.5"),
        (
            {"shared_memory_per_block_optin": 64 << 10},
            "it needs 75328 bytes of shared memory for a block, and the GPU has 65536",
        ),
        ({}, None),
    ],
)
def test_small_gpus_are_refused(properties, message, monkeypatch):
    h100 = {"major": 9, "minor": 0, "shared_memory_per_block_optin": 227 << 10}
    found = SimpleNamespace(**(h100 | properties))
    monkeypatch.setattr(cuda, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    arguments = (GPU, torch.bfloat16, (1, 64, 9, 9), 2, 7)
    assert cuda.why_not_like(*arguments, traced=True) == message


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((torch.device("cpu"), torch.bfloat16, (1, 64, 9, 9), 2, 7), "CUDA tensors, not cpu"),
        ((GPU, torch.float32, (1, 64, 9, 9), 2, 7), "bfloat16 or float16, not torch.float32"),
        ((GPU, torch.float16, (1, 48, 9, 9), 2, 7), "heads of width 8, 16, 32 or 64, not 24"),
        ((GPU, torch.float16, (1, 64, 9, 9), 2, 9), "a kernel_size of 7 at most, not 9"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(arguments, message, monkeypatch):
    monkeypatch.setattr(cuda, "MISSING", None)
    assert message in cuda.why_not_like(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    inputs = [x.permute(0, 3, 1, 2) for x in make(VARIANTS["32"], 1, 1, 3, 4)[:3]]
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: "):
        local_attention(*inputs, None, None, kernel_size=7, num_heads=1, backend="cuda")
