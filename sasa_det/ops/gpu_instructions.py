"""What a kernel executes, counted in what NVIDIA's disassembler prints."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .cuda_compiler import CompiledKernel

# Condition, name and operands of an instruction.
Instruction = tuple[str | None, str, str]

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_CONDITION = re.compile(r"\s*!?U?P\d")  # of a branch, where it is an operand
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def disassembler() -> str | None:
    """Return the path of nvdisasm, or None where it is not installed."""
    found = shutil.which("nvdisasm")
    if found is None and (triton := importlib.util.find_spec("triton")):
        inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(inside) if inside.exists() else None
    return found


def print_code(code: bytes, name: str, tool: str = "nvdisasm", option: str = "-c") -> str:
    """Return what one of NVIDIA's tools prints of a compiled kernel.

    Args:
        code: of the kernel, as a cubin.
        name: of the kernel, for messages.
        tool: the disassembler, or a tool beside it.
        option: of the tool.

    Raises:
        RuntimeError: if the disassembler is not installed, or the tool cannot read the code.
    """
    program = disassembler()
    if program is None:
        raise RuntimeError("nvdisasm, which Triton brings, is not installed.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        command = [Path(program).with_name(tool), option, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} cannot read {name}: {done.stderr.strip()}.")
    return done.stdout


def read_listing(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions that the disassembler has printed, and where its labels stand."""
    code, labels = [], {}
    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            code.append(match.groups())
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
    return code, labels


def target_of(instruction: Instruction, labels: dict[str, int]) -> int | None:
    """Return where a branch or call leads, or None if it names no label."""
    found = _TARGET.search(instruction[2])
    return labels[found[1]] if found else None


def is_conditional(instruction: Instruction) -> bool:
    """Tell whether an instruction depends on a condition, or on threads that diverge."""
    predicate, name, operands = instruction
    return bool(predicate or _CONDITION.match(operands) or name.startswith("BRA.DIV"))


class Work(NamedTuple):
    """What a warp does for 16 queries, or keys, of a head.

    Args:
        instructions: that it executes.
        wavefronts: of 128 bytes that pass into or out of shared memory or L1 cache, one a clock for
            an SM. It is their least number, as addresses may share a bank.
    """

    instructions: float
    wavefronts: float


def work_per_head(kernel: CompiledKernel, heads: int, parts: int) -> Work:
    """Count what a warp does in a block, over the heads of the block and the parts of the warp.

    It is the longest way through the code, but for what follows a vote: that is for values that are
    not finite.

    Args:
        kernel: what was compiled.
        heads: number of the block's heads, over which the kernel loops.
        parts: of 16 pixels that a warp has.

    Raises:
        RuntimeError: if the disassembler is not installed, or cannot read the code.
    """
    code, labels = read_listing(print_code(kernel.code, kernel.name))
    executed = [code[i] for i in way_through(code, labels, heads)]
    passed = sum(wavefronts(*instruction[:2]) for instruction in executed)
    return Work(len(executed) / heads / parts, passed / heads / parts)


_PASSING = ("LDS", "STS", "LDG", "STG", "LDL", "STL", "LDGSTS")


def wavefronts(predicate: str | None, name: str) -> int:
    """Return those of an instruction, see :class:`Work`."""
    kind, *modifiers = name.split(".")
    if predicate == "@!PT":  # never done
        return 0
    if kind == "LDSM":  # a matrix is one
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if kind == "SHFL":
        return 1
    if kind in _PASSING:
        return next((bits // 32 for bits in (128, 64) if str(bits) in modifiers), 1)
    return 0


def way_through(code: list[Instruction], labels: dict[str, int], heads: int) -> list[int]:
    """Return the numbers of the instructions that a warp executes, see :func:`work_per_head`."""
    # The only loop on this way is that over heads, if a block has several.
    rounds = 1
    way: list[int] = []
    at = 0
    voted = False
    while True:
        instruction = code[at]
        name = instruction[1]
        way.append(at)
        at += 1
        if name.startswith("VOTE.ANY"):
            voted = True
        elif name.startswith(("BRA", "EXIT")):
            target = target_of(instruction, labels)
            if target is not None and target < at:
                taken = rounds < heads
                rounds += 1
            else:
                taken = voted or not is_conditional(instruction)
            voted = False
            if taken and target is None:
                return way
            if taken:
                at = target
