"""CUDA kernels on a CPU that emulates the warps of a GPU.

Their source is compiled for the CPU with cuda_emulation/warp.cuh in place of the one that has the
GPU's instructions.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from sasa_det.ops.cuda_compiler import SOURCES

COMPILER = shutil.which("g++")
EMULATION = Path(__file__).parent / "cuda_emulation"


class _Range(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_ulonglong),
        ("written", ctypes.c_int),
    ]


class _Start(ctypes.Structure):
    # As in cuda_emulation/launch.h.
    _fields_ = [
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("skipped", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("num_ranges", ctypes.c_int),
        ("ranges", ctypes.POINTER(_Range)),
        ("bank_conflicts", ctypes.c_int),
        ("barriers", ctypes.c_int),
    ]


class Emulation:
    """Kernels that were compiled for this CPU.

    Args:
        library: of which ``run`` starts a kernel by its number.
        names: of the kernels, with template arguments, in the order of their numbers.
    """

    def __init__(self, library, names):
        self._library, self._names = library, names
        library.run.restype = ctypes.c_char_p

    def start(self, launch, read=(), written=(), skipped=-1, seed=0):
        """Start a kernel; return what is wrong, "" if nothing, and a thread's number of barriers.

        Args:
            launch: a :class:`sasa_det.ops.cuda_kernels.Launch`.
            read, written: tensors whose memory it may use; all memory if there are none.
            skipped: a barrier that no thread waits at, counted from 0; -1 for none.
            seed: of the order of the threads.
        """
        ranges = [_Range(*_memory(x), 0) for x in read] + [_Range(*_memory(x), 1) for x in written]
        arguments = _Start(
            ctypes.addressof(launch.arguments),
            launch.grid,
            launch.threads,
            launch.shared_bytes,
            skipped,
            seed,
            len(ranges),
            (_Range * len(ranges))(*ranges),
        )
        number = self._names.index(launch.name)
        message = self._library.run(number, ctypes.byref(arguments)).decode()
        assert arguments.bank_conflicts == 0
        return message, arguments.barriers


def _memory(x):
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@pytest.fixture(scope="session")
def emulate_kernels(tmp_path_factory):
    """Return a function that compiles kernels for this CPU, from headers of csrc/cuda.

    It takes the headers, and the structures that the kernels take by their names with template
    arguments.
    """
    if COMPILER is None:
        pytest.skip("g++ is not installed")

    def emulate(headers, structures):
        folder = tmp_path_factory.mktemp("emulation")
        source, built = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text(_source(headers, structures))
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC"]
        command += [f"-I{EMULATION}", f"-I{SOURCES}", source, "-o", built]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        return Emulation(ctypes.CDLL(str(built)), list(structures))

    return emulate


def _source(headers, structures):
    lines = [f"#include <{header}>" for header in (*headers, "launch.h")]
    lines.append("static const emulation::Kernel kernels[] = {")
    for name, structure in structures.items():
        call = f"{name}(*static_cast<const {structure}*>(x))"
        lines.append(f"  [](const void* x) {{ {call}; }},")
    lines += [
        "};",
        'extern "C" const char* run(int which, const emulation::Start* start) {',
        "  return emulation::run(kernels[which], *start);",
        "}",
    ]
    return "\n".join(lines)
