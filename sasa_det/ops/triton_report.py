"""What the Triton kernels take of a GPU; no GPU is needed.

``python -m sasa_det.ops.triton_report`` compiles the kernels for NVIDIA's GPUs and prints a table
of registers, bytes of stack, shared memory, and the instructions that a program executes, with all
of its warps: before its first tile, and for a tile, which has 16 queries (or keys) of a head.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .gpu_instructions import (
    Instruction,
    is_conditional,
    print_code,
    read_listing,
    target_of,
)
from .triton_constants import KERNELS, compile_options, kernel_constants

HEAD_WIDTHS = (8, 16, 32, 64)
# Type of the images, and whether products of float32 are TF32.
TYPES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_FLOAT32 = ("rel_rows", "rel_cols", "log_sum", "mean", "grad_embeddings")
_INTEGERS = ("height", "width", "heads", "steps")
_STRIDES = ("stride", "output_stride")  # of 16 elements, as for all usual numbers of channels


def compile_kernel(
    kernel: str, type_name: str, head_width: int, kernel_size: int, capability: int
) -> CompiledKernel:
    """Compile a kernel of :data:`~sasa_det.ops.triton_constants.KERNELS`.

    Args:
        kernel: its name.
        type_name: one of :data:`TYPES`.
        head_width: channels of a head.
        kernel_size: the extent of windows.
        capability: of the GPU, such as 90 for sm_90.
    """
    dtype, tf32 = TYPES[type_name]
    function = KERNELS[kernel]
    constants = kernel_constants(kernel, dtype, head_width, kernel_size, tf32=tf32)
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in _INTEGERS:
            signature[name] = "i32"
            continue
        float32 = name in _FLOAT32
        pointer = _POINTERS[torch.float32 if float32 else dtype]
        signature[name] = "i32" if name in _STRIDES else pointer
        attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = compile_options(kernel, dtype, head_width)
    return triton.compile(source, target=target, options=options)


def resources(compiled: CompiledKernel) -> SimpleNamespace:
    """Return ``registers`` and ``stack`` (bytes) of a thread, and ``shared`` bytes of a program."""
    printed = print_code(compiled.asm["cubin"], compiled.name, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    shared = compiled.metadata.shared
    return SimpleNamespace(registers=int(found[1]), stack=int(found[2]), shared=shared)


def count_instructions(listing: str, chunks: int) -> tuple[int, int]:
    """Count the instructions that a warp executes before its first tile, and for a tile.

    Args:
        listing: what the disassembler prints of a kernel that loops over tiles.
        chunks: how often the loops over the halo of a tile run.

    Returns:
        (start, tile): their numbers on the shortest ways, with the loops that lie on them. Windows
        are computed one by one on longer ones, where a result is not finite.
    """
    code, labels = read_listing(listing)
    following = [_following(code, labels, at) for at in range(len(code))]
    loops = [(to, at) for at, targets in enumerate(following) for to in targets if to < at]
    tiles = max(loops, key=lambda loop: loop[1] - loop[0])
    way = _shortest_way(following, *tiles)
    rounds = [_shortest_way(following, *loop) for loop in loops if loop[0] in way[1:]]
    # What leads back only through the next tile is no loop, but code that was moved out of the way.
    repeated = [at for x in rounds if tiles[0] not in x for at in x]
    start = _shortest_way(following, 0, tiles[0])[:-1]
    start, tile = (
        sum(code[at][1] != "NOP" for at in x) for x in (start, [*way, *repeated * (chunks - 1)])
    )
    return start, tile


def _following(code: list[Instruction], labels: dict[str, int], at: int) -> list[int]:
    """Return where the code can go on after an instruction."""
    predicate, name, _ = code[at]
    uniform = name.startswith(("BRA.DIV", "BRA.CONV"))  # if all threads are there
    conditional = is_conditional(code[at]) or uniform
    on = [at + 1] if at + 1 < len(code) else []
    # A call is a branch, too, but for those of functions, which come back.
    target = target_of(code[at], labels) if name.startswith(("BRA", "CALL")) else None
    if target is not None:
        return [target, *(on if conditional else [])]
    if name.startswith("EXIT"):
        return on if predicate else []
    return on


def _shortest_way(following: list[list[int]], start: int, end: int) -> list[int]:
    """Return the instructions from one to another, both included."""
    previous = {start: None}
    front = [start]
    while end not in previous:
        if not front:
            raise RuntimeError("the disassembler's listing has instructions that nothing leads to.")
        targets = [(to, at) for at in front for to in following[at]]
        front = []
        for to, at in targets:
            if to not in previous:
                previous[to] = at
                front.append(to)
    way = [end]
    while (at := previous[way[-1]]) is not None:
        way.append(at)
    return way


def measure(
    kernel: str, type_name: str, head_width: int, kernel_size: int, capability: int
) -> dict[str, object]:
    """Return a row of the table; arguments as of :func:`compile_kernel`."""
    compiled = compile_kernel(kernel, type_name, head_width, kernel_size, capability)
    taken = resources(compiled)
    dtype, tf32 = TYPES[type_name]
    chunks = kernel_constants(kernel, dtype, head_width, kernel_size, tf32=tf32)["CHUNKS"]
    warps = compiled.metadata.num_warps
    listing = print_code(compiled.asm["cubin"], compiled.name)
    start, tile = count_instructions(listing, chunks)
    return {
        "architecture": f"sm_{capability}",
        "type": type_name,
        "kernel": kernel,
        "head width": head_width,
        "warps": warps,
        "registers": taken.registers,
        "stack bytes": taken.stack,
        "shared KiB": round(taken.shared / 1024, 1),
        "instructions before": warps * start,
        "of a tile": warps * tile,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sasa_det.ops.triton_report",
        description="Compile the Triton kernels of local attention and print what they take of a "
        "GPU, and the instructions that are executed for 16 queries of a head.",
    )
    parser.add_argument("--capabilities", nargs="+", type=int, default=[90], metavar="XY")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--head-widths", nargs="+", type=int, default=HEAD_WIDTHS, metavar="N")
    parser.add_argument("--kernel-size", type=int, default=7, metavar="N")
    options = parser.parse_args(arguments)
    choices = (options.capabilities, options.types, KERNELS, options.head_widths)
    for i, (capability, type_name, kernel, head_width) in enumerate(itertools.product(*choices)):
        row = measure(kernel, type_name, head_width, options.kernel_size, capability)
        for cells in [row.values()] if i else [row.keys(), ["---"] * len(row), row.values()]:
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
