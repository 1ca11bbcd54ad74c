"""The CUDA kernels go through the compiler for GPUs of data centres, which takes no GPU."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch

from sasa_det.ops import cuda_compiler
from sasa_det.ops.cuda_compiler import CompilerError, compile_kernel
from sasa_det.ops.cuda_kernels import HEAD_WIDTHS, KERNELS, Variant
from sasa_det.ops.gpu_instructions import disassembler, work_per_head
from sasa_det.ops.gpu_prediction import GPUS
from sasa_det.ops.gpu_report import ARCHITECTURES, predictions

needs_compiler = pytest.mark.skipif(
    cuda_compiler.missing() is not None, reason=str(cuda_compiler.missing())
)

BF16, FP16 = torch.bfloat16, torch.float16

FORWARD, QUERY, KEY = KERNELS
# Instructions that a warp executes for 16 queries of a head, by kernel and head width.
INSTRUCTIONS = {
    FORWARD: {8: 390, 16: 440, 32: 590, 64: 780},
    QUERY: {8: 570, 16: 610, 32: 840, 64: 1200},
    KEY: {8: 590, 16: 690, 32: 850, 64: 1240},
}
# Of the last two together.
BACKWARD = {8: 1130, 16: 1270, 32: 1640, 64: 2380}
# Wavefronts of shared memory, likewise.
WAVEFRONTS = {
    FORWARD: {8: 70, 16: 115, 32: 205, 64: 335},
    QUERY: {8: 105, 16: 160, 32: 310, 64: 490},
    KEY: {8: 185, 16: 260, 32: 425, 64: 700},
}
# What pooling takes of the kernel that writes the output, and of the others.
POOLING = {FORWARD: 120, QUERY: 60, KEY: 90}
SPILLED_BYTES = {8: 64, 16: 64, 32: 64, 64: 120}
# The compiler for sm_100 loads earlier.
SPILLED_BYTES_OF_100 = {**SPILLED_BYTES, 32: 170}
# All GPUs from compute capability 8.0 on have this for a block.
SHARED_BYTES = 99 * 1024


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder of these tests for compiled kernels."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "sasa_det" / "cuda"


def check_limits(architecture, dtype, head_width, pooled=False):
    variant = Variant(dtype, head_width, 7, pooled=pooled)
    counts = {}
    for name, kernel in KERNELS.items():
        compiled = compile_kernel(kernel.header, variant.name(name), architecture)
        split = variant.split_of(name)
        # As many blocks as planned fit an SM.
        assert compiled.resources.registers * split.threads * split.blocks <= 2**16
        spilled = SPILLED_BYTES_OF_100 if architecture == "sm_100" else SPILLED_BYTES
        assert compiled.resources.spill_bytes <= spilled[head_width]
        assert kernel.shared_bytes(variant) <= SHARED_BYTES
        if disassembler():
            count, wavefronts = work_per_head(compiled, variant.heads_of_block, split.parts)
            # Less than half of it would be code that does nothing.
            limit = INSTRUCTIONS[name][head_width] + pooled * POOLING[name]
            assert limit / 2 <= count <= limit
            limit = WAVEFRONTS[name][head_width] + pooled * POOLING[name] / 4
            assert limit / 2 <= wavefronts <= limit
            counts[name] = count
    if counts and not pooled:
        assert counts[QUERY] + counts[KEY] <= BACKWARD[head_width]


QUICK = [("sm_80", FP16, 8), ("sm_90", BF16, 32), ("sm_100", BF16, 64)]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(ARCHITECTURES, (BF16, FP16), HEAD_WIDTHS)
]


@needs_compiler
@pytest.mark.parametrize("architecture,dtype,head_width", CASES)
def test_kernels_stay_within_their_limits(architecture, dtype, head_width):
    check_limits(architecture, dtype, head_width)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("head_width", [16, 32, 64])  # those of strided layers
def test_kernels_that_pool_stay_within_their_limits(head_width):
    check_limits("sm_90", BF16, head_width, pooled=True)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_shared_memory_of_an_sm_suffices_for_the_blocks_that_are_chosen(head_width):
    for kernel in KERNELS.values():
        for pooled in (False, True):
            for split in kernel.splits(head_width, pooled):
                variant = Variant(BF16, head_width, 7, pooled=pooled, split=split)
                # Given out 128 bytes at a time, and each block has 1 KiB of its own.
                taken = -(-kernel.shared_bytes(variant) // 128) * 128 + 1024
                assert taken * split.blocks <= 228 * 1024


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("head_width", [8, 64])
def test_an_sm_holds_as_many_blocks_as_are_chosen(head_width):
    for name, kernel in KERNELS.items():
        first, *others = kernel.splits(head_width, pooled=False)
        usual = Variant(BF16, head_width, 7)
        assert replace(usual, split=first).name(name) == usual.name(name)
        for split in (first, *others):
            variant = replace(usual, split=split)
            taken = compile_kernel(kernel.header, variant.name(name), "sm_90").resources
            assert taken.registers * split.threads * split.blocks <= 2**16


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("gpu,forward,step", [(GPUS[0], 1.02, 1.3), (GPUS[1], 0.8, 0.92)])
def test_predicted_times_of_retinanet(gpu, forward, step):
    """With room for what another release of the compiler makes of the kernels."""
    total = predictions(gpu)[-1]
    assert total["layer"] == "RetinaNet-50"
    assert float(total["ratio forward"]) <= forward and float(total["ratio step"]) <= step


@needs_compiler
def test_a_compiled_kernel_is_kept(cache, caplog):
    name = Variant(BF16, 8, 1, content=False).name("local_attention_forward")
    with caplog.at_level("INFO", logger=cuda_compiler.__name__):
        first = compile_kernel("local_attention_forward.cuh", name, "sm_80")
        second = compile_kernel("local_attention_forward.cuh", name, "sm_80")
    assert first == second and first.code.startswith(b"\x7fELF")
    assert len(caplog.records) == 1 and f"Compiled {name} for sm_80" in caplog.text
    assert len(list(cache.glob("local_attention_forward-Bfloat16-8-1-*.kernel"))) == 1


@needs_compiler
def test_a_damaged_file_is_compiled_again():
    name = Variant(BF16, 8, 1, content=False).name("local_attention_forward")
    arguments = "local_attention_forward.cuh", name, "sm_80"
    right = compile_kernel(*arguments)
    path = cuda_compiler._cached_path(*arguments)
    whole = path.read_bytes()
    line = whole.split(b"\n")[0]
    changed = bytearray(whole)
    changed[-1] ^= 1
    for damaged in (b"", whole[:100], line, line + b"\n", whole[:-9], changed, b"[1]\n", b"1\n2"):
        path.write_bytes(damaged)
        assert cuda_compiler._read(path) is None
    again = compile_kernel(*arguments)
    # Of two compilations, the code differs in what only says where it comes from.
    assert (again.symbol, again.resources) == (right.symbol, right.resources)
    assert cuda_compiler._read(path) == again


@needs_compiler
def test_what_does_not_compile_is_told():
    with pytest.raises(CompilerError, match=r"missing<1> cannot be compiled for sm_90: .*missing"):
        compile_kernel("local_attention_forward.cuh", "missing<1>", "sm_90")


def test_without_the_package_it_says_so(monkeypatch):
    # What an import of a package that is not installed does.
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(cuda_compiler, "missing", cuda_compiler.missing.__wrapped__)
    with pytest.raises(CompilerError) as error:
        compile_kernel("local_attention_forward.cuh", "kernel", "sm_90")
    assert str(error.value) == (
        "kernel cannot be compiled: the package cuda-bindings, which PyTorch's CUDA builds bring, "
        "is not installed."
    )
