"""The Triton kernels go through the compiler for a data-centre GPU, which takes no GPU."""

import os
import subprocess
import sys

import pytest

from sasa_det.ops import available_backends

# Without detectron2, which kernels do not need and which takes seconds to import.
COMPILE = """
import importlib.util
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
from sasa_det.ops import triton_kernels as kernels

def compile_kernel(name, dtype, depth, kernel=7, capability=90):
    pointers = {
        "query": dtype, "key": dtype, "value": dtype, "output": dtype, "grad": dtype,
        "grad_query": dtype, "grad_key": dtype, "grad_value": dtype,
    }
    options = {
        "DEPTH": depth, "D": max(16, triton.next_power_of_2(depth)), "KERNEL": kernel,
        "K": max(16, triton.next_power_of_2(kernel)),
        "COLS": max(16, triton.next_power_of_2(8 + kernel - 1)), "TILE": 8,
        "CONTENT": True, "RELATIVE": True, "MASK": True, "PRECISION": "ieee", "EXACT": "ieee",
    }
    function = getattr(kernels, name)
    constants = {k: v for k, v in options.items() if k in function.arg_names}
    signature = {}
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("height", "width", "heads", "programs"):
            signature[argument] = "i32"
        else:
            signature[argument] = "*" + pointers.get(argument, "fp32")
    source = ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"], name
    print(name, dtype, "mma" in compiled.asm["ptx"], compiled.metadata.shared)

for dtype, depth in (("bf16", 32), ("fp32", 8)):
    for name in ("_forward_kernel", "_query_kernel", "_key_kernel"):
        compile_kernel(name, dtype, depth)
"""


@pytest.mark.slow
@pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed")
def test_kernels_compile():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    kernels = ["_forward_kernel", "_query_kernel", "_key_kernel"]
    assert [line[:2] for line in lines] == [[k, t] for t in ("bf16", "fp32") for k in kernels]
    assert all(line[2] == "True" for line in lines if line[1] == "bf16"), "no tensor cores"
