"""The Triton kernels go through the compiler for GPUs of data centres, which takes no GPU."""

import os
import subprocess
import sys

import pytest

from sasa_det.ops import available_backends, triton
from sasa_det.ops.gpu_instructions import disassembler

pytestmark = [
    pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed"),
    pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed"),
]

# Instructions of a tile, by type, head width and kernel.
_OF_HALVES = {
    8: {"forward": 1250, "query": 1700, "key": 1650},
    16: {"forward": 1250, "query": 1700, "key": 1650},
    32: {"forward": 1500, "query": 2000, "key": 2000},
    64: {"forward": 2200, "query": 4200, "key": 3000},
}
INSTRUCTIONS = {
    "bfloat16": _OF_HALVES,
    "float16": _OF_HALVES,
    "tf32": {
        8: {"forward": 1400, "query": 1800, "key": 1850},
        16: {"forward": 1300, "query": 2150, "key": 2450},
        32: {"forward": 2000, "query": 4000, "key": 3400},
        64: {"forward": 3100, "query": 6900, "key": 5000},
    },
    "float32": {
        8: {"forward": 2000, "query": 3000, "key": 3400},
        16: {"forward": 2300, "query": 4600, "key": 4300},
        32: {"forward": 3500, "query": 7200, "key": 7200},
        64: {"forward": 5800, "query": 13900, "key": 12600},
    },
}
# What the 8 warps of an SM can keep in its cache.
STACK_BYTES = {8: 128, 16: 144, 32: 256, 64: 512}
STACK_BYTES_OF_FLOAT32 = 512
# An SM has room for 8 warps, by its registers and by its shared memory.
WARPS, REGISTERS, SHARED_BYTES = 8, 2**16, 164 * 1024


# What is compiled: capability, type, head widths and kernel size. Every type and head width is
# compiled, and every type for several GPUs.
CASES = [
    *((80, type_name, [8], 7) for type_name in ("bfloat16", "tf32")),
    (80, "float16", [16, 64], 7),
    (80, "float32", [8, 32], 7),
    (90, "bfloat16", [16, 32], 7),
    (90, "float16", [8], 7),
    (90, "tf32", [32, 64], 7),
    (90, "float32", [64], 7),
    (100, "bfloat16", [64], 7),
    (100, "float16", [32], 7),
    *((100, type_name, [16], 7) for type_name in ("tf32", "float32")),
    *(
        (80, type_name, [triton.WIDEST_HEAD], kernel_size)
        for type_name in ("float16", "float32")
        for kernel_size in (1, triton.WIDEST_KERNEL)
    ),
]

# Prints the table of each case, which are words of the command, and an empty line behind it.
REPORT = """
import sys
from sasa_det.ops.triton_report import main

for words in sys.argv[1:]:
    main(words.split())
    print()
"""


@pytest.fixture(scope="module")
def tables():
    """Compile in a process of its own: in this one, Triton may be an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [
        f"--capabilities {capability} --types {type_name} --kernel-size {kernel_size} "
        f"--head-widths {' '.join(map(str, head_widths))}"
        for capability, type_name, head_widths, kernel_size in CASES
    ]
    command = [sys.executable, "-c", REPORT, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.removesuffix("\n\n").split("\n\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number]}")
def test_kernels_stay_within_their_limits(tables, number):
    _, type_name, head_widths, kernel_size = CASES[number]
    assert len(tables) == len(CASES)
    lines = tables[number].splitlines()
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    assert len(rows) == 3 * len(head_widths)
    for row in rows:
        width = int(row["head width"])
        shared, warps = float(row["shared KiB"]) * 1024, int(row["warps"])
        assert shared <= triton.SHARED_BYTES
        # Registers are given out eight at a time, and a program has 1 KiB of its own.
        of_program = 32 * warps * -(-int(row["registers"]) // 8) * 8
        assert warps * (REGISTERS // of_program) >= WARPS
        if kernel_size == 7:
            assert warps * (SHARED_BYTES // (shared + 1024)) >= WARPS
        if kernel_size == 7:
            count, limit = int(row["of a tile"]), INSTRUCTIONS[type_name][width][row["kernel"]]
            # Less than half of it would be code that does nothing.
            assert limit / 2 <= count <= limit
            limit = STACK_BYTES_OF_FLOAT32 if type_name == "float32" else STACK_BYTES[width]
            assert int(row["stack bytes"]) <= limit
