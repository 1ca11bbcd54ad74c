"""The Triton kernels go through the compiler for a data-centre GPU, which takes no GPU."""

import os
import subprocess
import sys

import pytest

from sasa_det.ops import available_backends

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sasa_det.ops import triton_kernels as kernels

dtype, depth, kernel, capability = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
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
for name in ("_forward_kernel", "_query_kernel", "_key_kernel"):
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
    print(name, "mma" in compiled.asm["ptx"], compiled.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype,depth", [("bf16", 32), ("fp32", 8)])
def test_kernels_compile(dtype, depth):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", COMPILE, dtype, str(depth), "7", "90"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["_forward_kernel", "_query_kernel", "_key_kernel"]
    if dtype == "bf16":
        assert all(line[1] == "True" for line in lines), "no tensor cores"
