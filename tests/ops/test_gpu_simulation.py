"""The simulation of an SM, against times that can be told from what it runs."""

import pytest
import torch

from sasa_det.ops import cuda_compiler
from sasa_det.ops.cuda_compiler import compile_kernel
from sasa_det.ops.cuda_kernels import KERNELS, Variant
from sasa_det.ops.gpu_instructions import disassembler, work_per_head
from sasa_det.ops.gpu_simulation import (
    MACHINES,
    Issue,
    _issue,
    blocks_of_sm,
    clocks_of_block,
    read_issues,
    simulate,
)

H100 = MACHINES["sm_90"]
COUNT = 1000
FORWARD, QUERY, KEY = KERNELS

needs_compiler = pytest.mark.skipif(
    cuda_compiler.missing() is not None or disassembler() is None,
    reason="there is no compiler or disassembler of kernels",
)


def clocks(issues, warps=1, blocks=1):
    return clocks_of_block(issues, warps, blocks, H100)


@pytest.mark.parametrize(
    "issue,warps,expected",
    [
        # A warp alone waits as long as its instructions say, whatever is free.
        (Issue("FFMA", "floats", stall=1), 1, COUNT),
        (Issue("FFMA", "floats", stall=5), 1, 5 * COUNT),
        # Four schedulers have a warp each, or two of them.
        (Issue("FFMA", "floats"), 4, COUNT),
        (Issue("FFMA", "floats"), 8, 2 * COUNT),
        (Issue("FFMA", "floats", stall=4), 16, 4 * COUNT),
        # Their units take longer than a clock, and there is one for each scheduler.
        (Issue("FSEL", "integers", 2), 8, 4 * COUNT),
        (Issue("HMMA", "HMMA", 6), 8, 12 * COUNT),
        # All share the memory.
        (Issue("LDSM", "memory", 4), 1, 4 * COUNT),
        (Issue("LDSM", "memory", 4), 8, 32 * COUNT),
    ],
)
def test_what_a_block_waits_for(issue, warps, expected):
    assert clocks([issue] * COUNT, warps) == pytest.approx(expected + H100.start, abs=110)


def test_a_scheduler_issues_to_two_units_in_turn():
    both = [Issue("FSEL", "integers", 2), Issue("FFMA", "floats")]
    assert clocks(both * COUNT, warps=8) == pytest.approx(4 * COUNT + H100.start, abs=20)


def test_other_warps_hide_what_a_result_takes():
    pair = [Issue("LDS", "memory", 1, latency=19, result=2), Issue("FADD", "floats", waits=(2,))]
    alone = clocks(pair * COUNT)
    # 19 clocks behind the one in the memory's pipe, and one in the queue before it.
    assert alone == pytest.approx(22 * COUNT, rel=0.02)
    few = 100
    some = 22 * few + H100.start
    assert clocks(pair * few, blocks=4) == pytest.approx(some / 4, rel=0.05)
    # Until the pipe is full.
    assert clocks(pair * few, blocks=40) == pytest.approx(few, rel=0.15)


def test_counters_of_operands_are_down_before_those_of_results():
    load = Issue("LDG", "memory", 1, latency=500, operands=0, result=1)
    after = [clocks([load, Issue("MOV", waits=(x,))]) for x in (0, 1)]
    assert after[1] - after[0] == pytest.approx(500 - 8, abs=2)


def test_copies_are_waited_for_and_barriers_hold_all_warps():
    copy = Issue("LDGSTS", "memory", 4, latency=700)
    one = clocks([copy, Issue("DEPBAR")])
    assert one == pytest.approx(700 + H100.start, abs=10)
    # The last of 8 warps' 100 copies.
    many = [copy] * 100 + [Issue("DEPBAR"), Issue("BAR", stall=5), Issue("FADD", "floats")]
    assert clocks(many, warps=8) == pytest.approx(4 * 800 + 700 + H100.start, abs=40)


def test_an_instruction_is_read_from_its_word():
    # Stall, counters of result and operands, and those that are waited for.
    word = 11 << 41 | 3 << 46 | 7 << 49 | 0b100001 << 52
    issue = _issue(None, "LDSM.16.M88.4", word, H100)
    assert issue == Issue("LDSM", "memory", 4, 26, 11, 3, None, (0, 5))
    assert _issue(None, "HMMA.1688.F32", word, H100).clocks == 4
    assert _issue("@!PT", "LDS", word, H100).unit == ""
    # Of images, and of the kernels' tables.
    latencies = [_issue(None, x, word, H100).latency for x in ("LDG.E.128", "LDG.E.EL.64")]
    assert latencies == [400, 60]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name,head_width", [(FORWARD, 64), (QUERY, 16), (QUERY, 32)])
def test_a_kernel_takes_what_it_executes_at_least(name, head_width, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variant = Variant(torch.bfloat16, head_width, 7)
    heads, parts = variant.heads_of_block, variant.split_of(name).parts
    kernel = compile_kernel(KERNELS[name].header, variant.name(name), "sm_90")
    work = work_per_head(kernel, heads, parts)
    issues = read_issues(kernel, heads, H100)
    assert len(issues) == work.instructions * heads * parts
    moved = sum(x.clocks for x in issues if x.unit == "memory" and x.name != "MOVM")
    assert moved == work.wavefronts * heads * parts
    warps, simulated = simulate(name, variant, H100)
    split = variant.split_of(name)
    assert warps == split.blocks * split.threads // 32
    together = work.instructions / 4 + work.wavefronts
    assert max(work.instructions / 4, work.wavefronts) < simulated < 1.1 * together


@needs_compiler
@pytest.mark.slow
def test_an_a100_has_shared_memory_for_one_block_of_the_largest_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variant = Variant(torch.bfloat16, 64, 7)
    for architecture, blocks in (("sm_80", 1), ("sm_90", 2)):
        kernel = compile_kernel(KERNELS[KEY].header, variant.name(KEY), architecture)
        taken = variant.split_of(KEY).threads, KERNELS[KEY].shared_bytes(variant)
        assert blocks_of_sm(kernel, *taken, MACHINES[architecture]) == blocks
