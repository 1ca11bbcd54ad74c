"""The instructions that a kernel executes, counted in what NVIDIA's disassembler prints."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .cuda_compiler import CompiledKernel

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)(.*?)\s*;")
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


def instructions_per_head(kernel: CompiledKernel, heads: int, inner: int = 1) -> float:
    """Count the instructions that a warp executes in a block, over the heads of the block.

    It is the longest way through the code, but for what follows a vote: that is for values that are
    not finite.

    Args:
        kernel: what was compiled.
        heads: number of the block's heads, over which the kernel loops.
        inner: how often a loop inside of that one is run through for a head, if there is one.

    Raises:
        RuntimeError: if the disassembler is not installed, or cannot read the code.
    """
    program = disassembler()
    if program is None:
        raise RuntimeError("nvdisasm, which Triton brings, is not installed.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.code)
        done = subprocess.run([program, "-c", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm cannot read {kernel.name}: {done.stderr.strip()}.")
    return _executed(done.stdout, heads, inner) / heads


def _executed(listing: str, heads: int, inner: int) -> int:
    code, labels = [], {}
    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            code.append(match.groups()[1:])
        elif match := _LABEL.match(line):
            labels[match[1]] = len(code)
    # Branches back; the loop over heads is the one with the vote.
    limits: dict[int, int] = {}
    rounds: dict[int, int] = {}
    vote = next(i for i, (_, name, _) in enumerate(code) if name.startswith("VOTE.ANY"))
    count = at = 0
    voted = False
    while True:
        predicate, name, operands = code[at]
        count += 1
        at += 1
        if name.startswith("VOTE.ANY"):
            voted = True
        elif name.startswith(("BRA", "EXIT")):
            target = labels[_TARGET.search(operands)[1]] if name.startswith("BRA") else None
            if target is not None and target < at:
                limits[at] = heads if target <= vote < at else inner
                rounds[at] = rounds.get(at, 0) + 1
                taken = rounds[at] < limits[at]
                if not taken:
                    rounds[at] = 0
            else:
                always = predicate is None and not _CONDITION.match(operands)
                taken = always or voted
            voted = False
            if taken and target is None:
                return count
            if taken:
                at = target
