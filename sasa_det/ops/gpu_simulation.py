"""A simulation of an SM that runs one of the CUDA kernels, from the code that was compiled.

The compiler writes into each instruction how many clocks a warp waits before its next one, and
which of six counters it waits for: those of results that take longer, such as of loads. Four
schedulers issue one instruction a clock each, of a warp that waits for nothing and whose unit is
free. Warps of an SM share what moves wavefronts into and out of shared memory. So the simulation
tells how much of the time the other warps of an SM hide, which a count of instructions does not.

What is not in the code is assumed: how long units are taken and loads take (:class:`Machine`).
All data comes after the same time, from wherever it is.

``python -m sasa_det.ops.gpu_simulation`` simulates all choices of :attr:`Kernel.splits`.
"""

import argparse
import collections
import heapq
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import UsageError
from ..utils.text import markdown_table
from .cuda_compiler import CompiledKernel, compile_kernel
from .cuda_kernels import HEAD_WIDTHS, KERNELS, PARTS_OF_TILE, Variant, choices_of
from .gpu_instructions import disassembler, print_code, read_listing, wavefronts, way_through

_SCHEDULERS = 4
_COUNTERS = 6
_MEMORY = ("LDS", "STS", "LDSM", "SHFL", "MOVM", "LDG", "STG", "LDL", "STL", "LDGSTS")
_FLOATS = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2")
_CONSTANTS = ("S2R", "S2UR", "LDC", "ULDC")
_CONTROL = ("BRA", "EXIT", "BAR", "BSSY", "BSYNC", "DEPBAR", "LDGDEPBAR", "NOP", "WARPSYNC", "CALL")
# The units of instructions; those that are not here are of integers.
_UNIT_OF = {
    **dict.fromkeys(_FLOATS, "floats"),
    **dict.fromkeys(_CONSTANTS, "constants"),
    **{"MUFU": "MUFU", "HMMA": "HMMA"},
    **dict.fromkeys((*_CONTROL, *_MEMORY), ""),  # of memory: those that are never done
}


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU, in clocks.

    Args:
        architecture: what kernels are compiled for.
        shared_kib: of an SM, for its blocks.
        units: how long an instruction takes a unit of a scheduler.
        latencies: of what instructions load or compute, by their names, after that.
        queue: number of instructions of a scheduler that may wait for shared memory.
        start: of a block, when another one has ended.
    """

    architecture: str
    shared_kib: int
    units: dict[str, int]
    latencies: dict[str, int] = field(
        default_factory=lambda: {
            **dict.fromkeys(("LDS", "SHFL", "MOVM", "LDL"), 22),
            **{"LDSM": 26, "MUFU": 18, "LDG": 400, "LDGSTS": 700, "LDG of a table": 60},
            **dict.fromkeys(_CONSTANTS, 25),
        }
    )
    queue: int = 6
    start: int = 300


_UNITS = {"integers": 2, "floats": 1, "MUFU": 8, "HMMA": 6, "constants": 2}
MACHINES = {
    "sm_90": Machine("sm_90", 228, _UNITS),
    "sm_80": Machine("sm_80", 164, {**_UNITS, "floats": 2, "HMMA": 8}),
}


class Issue(NamedTuple):
    """An instruction of a warp, and what the compiler says of it.

    Args:
        name: of the instruction, without what modifies it.
        unit: of :attr:`Machine.units`, "memory", or "" for none.
        clocks: that it takes the unit.
        latency: of its result after that.
        stall: clocks until the warp's next instruction.
        result, operands: numbers of the counters that are up until the result is there, and until
            operands have been read, or None.
        waits: counters that must be down.
    """

    name: str
    unit: str = ""
    clocks: int = 1
    latency: int = 0
    stall: int = 1
    result: int | None = None
    operands: int | None = None
    waits: tuple[int, ...] = ()


def read_issues(kernel: CompiledKernel, heads: int, machine: Machine) -> list[Issue]:
    """Return what a warp issues in a block, along the path that :func:`work_per_head` counts.

    Raises:
        RuntimeError: if the disassembler is not installed, or cannot read the code.
    """
    listing = print_code(kernel.code, kernel.name, option="-hex")
    code, labels = read_listing(listing)
    # The second half of each instruction stands in a line of its own.
    words = [
        int(x, 16) for x in re.findall(r"^\s+/\* 0x([0-9a-f]{16}) \*/$", listing, re.MULTILINE)
    ]
    if len(words) != len(code):
        raise RuntimeError(f"{kernel.name} has {len(code)} instructions and {len(words)} words.")
    return [_issue(*code[i][:2], words[i], machine) for i in way_through(code, labels, heads)]


def _issue(predicate: str | None, full_name: str, word: int, machine: Machine) -> Issue:
    name, *modifiers = full_name.split(".")
    of_table = name == "LDG" and "EL" in modifiers  # load_of_table of csrc/cuda/warp.cuh
    latency = machine.latencies.get("LDG of a table" if of_table else name, 0)
    if name in _MEMORY and predicate != "@!PT":
        unit, clocks = "memory", max(1, wavefronts(predicate, full_name))
    else:
        unit = _UNIT_OF.get(name, "integers")
        clocks = machine.units.get(unit, 1)
        if "1688" in modifiers:  # of half as many channels
            clocks -= clocks // 3

    def counter(first_bit: int) -> int | None:
        number = word >> first_bit & 7
        return number if number < _COUNTERS else None

    waits = tuple(i for i in range(_COUNTERS) if word >> (52 + i) & 1)
    stall = max(1, word >> 41 & 15)
    return Issue(name, unit, clocks, latency, stall, counter(46), counter(49), waits)


_NEVER = sys.maxsize


@dataclass
class _Warp:
    block: int
    ready: int  # the clock from which on it can issue
    at: int = 0  # its next instruction
    counters: list[int] = field(default_factory=lambda: [0] * _COUNTERS)
    copies: int = 0  # that have not landed
    arrived: bool = False  # at a barrier of its block
    ended: int = 0  # blocks: what returns later is of another one

    def begin(self, clock: int) -> None:
        self.ready, self.at, self.copies, self.ended = clock, 0, 0, self.ended + 1
        self.counters = [0] * _COUNTERS


class _Sm:
    """An SM whose blocks are replaced when they end."""

    def __init__(
        self, issues: Sequence[Issue], warps: int, blocks: int, machine: Machine, apart: int
    ):
        assert issues[-1].name != "BAR", "a block ends behind its last barrier"
        self.issues, self.machine, self.warps_of_block = issues, machine, warps
        self.warps = [_Warp(i // warps, apart * (i // warps)) for i in range(warps * blocks)]
        self.schedulers = [self.warps[i::_SCHEDULERS] for i in range(_SCHEDULERS)]
        self.taken: list[dict[str, int]] = [
            collections.defaultdict(int) for _ in range(_SCHEDULERS)
        ]
        self.queues: list[collections.deque] = [collections.deque() for _ in range(_SCHEDULERS)]
        self.events: list[tuple] = []  # counters that go down, by clock
        self.clock = self.memory_free = self.next_queue = self.number = 0
        self.ends: list[int] = []

    def run(self, ends: int) -> list[int]:
        """Return the clocks at which the first blocks end."""
        while len(self.ends) < ends:
            self._return_results()
            self._move_memory()
            for number in range(_SCHEDULERS):
                self._schedule(number)
            self.clock += 1
        return self.ends

    def _later(self, clocks: int, warp: _Warp, counter: int | None) -> None:
        if counter is None:
            return
        self.number += 1
        event = (self.clock + clocks, self.number, warp, warp.ended, counter)
        heapq.heappush(self.events, event)

    def _return_results(self) -> None:
        while self.events and self.events[0][0] <= self.clock:
            *_, warp, ended, counter = heapq.heappop(self.events)
            if ended != warp.ended:
                continue
            if counter == _COUNTERS:
                warp.copies -= 1
            else:
                warp.counters[counter] -= 1

    def _move_memory(self) -> None:
        """Give the memory's pipe to the next scheduler that waits for it."""
        if self.memory_free > self.clock:
            return
        for i in range(_SCHEDULERS):
            number = (self.next_queue + i) % _SCHEDULERS
            if self.queues[number]:
                warp, ended, issue = self.queues[number].popleft()
                self.next_queue = number + 1
                self.memory_free = self.clock + issue.clocks
                if ended == warp.ended:
                    self._later(issue.clocks + 8, warp, issue.operands)
                    self._later(issue.clocks + issue.latency, warp, issue.result)
                    if issue.name == "LDGSTS":
                        self._later(issue.clocks + issue.latency, warp, _COUNTERS)
                return

    def _schedule(self, number: int) -> None:
        """Issue an instruction of the first warp that can, which stays the first."""
        warps = self.schedulers[number]
        for i, warp in enumerate(warps):
            if warp.ready <= self.clock and self._issue(number, warp):
                warps[:] = warps[i:] + warps[:i]
                return

    def _issue(self, number: int, warp: _Warp) -> bool:
        issue = self.issues[warp.at]
        if any(warp.counters[x] for x in issue.waits):
            return False
        if issue.name == "DEPBAR" and warp.copies:
            return False
        if issue.unit == "memory":
            queue = self.queues[number]
            if len(queue) >= self.machine.queue:
                return False
            queue.append((warp, warp.ended, issue))
            warp.copies += issue.name == "LDGSTS"
        else:
            if issue.unit:
                if self.taken[number][issue.unit] > self.clock:
                    return False
                self.taken[number][issue.unit] = self.clock + issue.clocks
            self._later(issue.clocks + issue.latency, warp, issue.result)
            self._later(issue.clocks + 4, warp, issue.operands)
        for counter in (issue.result, issue.operands):
            if counter is not None:
                warp.counters[counter] += 1
        warp.at += 1
        warp.ready = self.clock + issue.stall
        if issue.name == "BAR":
            self._arrive(warp, issue.stall)
        elif warp.at == len(self.issues):
            warp.ready = _NEVER
            self._end(warp.block)
        return True

    def _arrive(self, warp: _Warp, stall: int) -> None:
        warp.arrived, warp.ready = True, _NEVER
        block = self._block(warp.block)
        if all(x.arrived for x in block):
            for x in block:
                x.arrived, x.ready = False, self.clock + stall

    def _end(self, block: int) -> None:
        warps = self._block(block)
        if all(x.at == len(self.issues) for x in warps):
            self.ends.append(self.clock)
            for x in warps:
                x.begin(self.clock + self.machine.start)

    def _block(self, number: int) -> list[_Warp]:
        first = number * self.warps_of_block
        return self.warps[first : first + self.warps_of_block]


# How many clocks apart the first blocks begin: how they meet later makes a tenth of their time.
_APART = (150, 450, 1000, 1900)


def clocks_of_block(
    issues: Sequence[Issue], warps: int, blocks: int, machine: Machine, rounds: int = 5
) -> float:
    """Return the clocks from the end of a block to the next one's.

    Args:
        issues: of a warp.
        warps: of a block.
        blocks: that the SM holds.
        machine: what is assumed of it.
        rounds: how many blocks are simulated in the place of each; the first two are not counted.
    """
    clocks = []
    for apart in _APART if blocks > 1 else (0,):
        ends = _Sm(issues, warps, blocks, machine, apart).run(rounds * blocks)
        clocks.append((ends[-1] - ends[2 * blocks - 1]) / ((rounds - 2) * blocks))
    return sum(clocks) / len(clocks)


def blocks_of_sm(kernel: CompiledKernel, threads: int, shared_bytes: int, machine: Machine) -> int:
    """Return how many blocks an SM holds, by registers and by shared memory."""
    registers = -(-kernel.resources.registers // 8) * 8 * threads
    return min(2**16 // registers, machine.shared_kib * 1024 // (shared_bytes + 1024))


def simulate(name: str, variant: Variant, machine: Machine) -> tuple[int, float]:
    """Simulate a kernel of :data:`sasa_det.ops.cuda_kernels.KERNELS`.

    Returns:
        (warps, clocks): of an SM, and for 16 queries, or keys, of a head.
    """
    kernel, split = KERNELS[name], variant.split_of(name)
    compiled = compile_kernel(kernel.header, variant.name(name), machine.architecture)
    issues = read_issues(compiled, variant.heads_of_block, machine)
    warps = split.threads // 32
    blocks = blocks_of_sm(compiled, split.threads, kernel.shared_bytes(variant), machine)
    clocks = clocks_of_block(issues, warps, blocks, machine)
    return warps * blocks, clocks / PARTS_OF_TILE / variant.heads_of_block


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if the disassembler is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sasa_det.ops.gpu_simulation",
        description="Simulate a multiprocessor that runs the CUDA kernels of local attention "
        "(bfloat16, 7 x 7 windows), with each choice of the parts of a warp and the blocks of an "
        "SM. It takes no GPU.",
    )
    parser.add_argument("--architecture", default="sm_90", choices=MACHINES)
    parser.add_argument(
        "--head-widths", nargs="+", type=int, default=HEAD_WIDTHS, choices=HEAD_WIDTHS
    )
    options = parser.parse_args(arguments)
    if disassembler() is None:
        raise UsageError(
            "nvdisasm, which Triton brings and the simulation needs, is not installed."
        )
    machine = MACHINES[options.architecture]
    rows = []
    for name in KERNELS:
        for head_width in options.head_widths:
            for variant in choices_of(name, head_width):
                warps, clocks = simulate(name, variant, machine)
                row = {
                    "kernel": name.removeprefix("local_attention_"),
                    "head width": head_width,
                    "choice": str(variant.split),
                    "warps of an SM": warps,
                    "clocks": round(clocks),
                }
                rows.append(row)
    print(markdown_table(rows))


if __name__ == "__main__":
    from ..command_line import run_command

    sys.exit(run_command(main))
