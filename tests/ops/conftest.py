"""CUDA kernels on a CPU that emulates the warps of a GPU.

Their source is compiled for the CPU with cuda_emulation/warp.cuh in place of the one that has the
GPU's instructions.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sasa_det.layers import joined
from sasa_det.ops import cuda, cuda_layer
from sasa_det.ops.cuda_compiler import SOURCES
from sasa_det.ops.cuda_kernels import KERNELS, EmbeddingArguments, Launch

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
        ("votes", ctypes.c_int),
    ]


class Emulation:
    """Kernels that were compiled for this CPU.

    Args:
        library: of which ``run`` starts a kernel by its number.
        names: of the kernels, with template arguments, in the order of their numbers.

    Attributes:
        votes: of warps in all starts, that a result is not finite.
    """

    def __init__(self, library, names):
        self._library, self._names = library, names
        self.votes = 0
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
        self.votes += arguments.votes
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


@pytest.fixture
def other_defaults():
    """PyTorch makes tensors of float64, without values, unless it is told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def emulated(library, monkeypatch):
    """The backend "cuda" with the emulated kernels of ``library``; the names of what started."""

    started = []

    def emulate(launch, query):
        started.append(launch.name.partition("<")[0])
        message, _ = library.start(launch)
        assert message == ""

    monkeypatch.setattr(cuda, "start", emulate)
    monkeypatch.setattr(cuda, "why_not", lambda *arguments, **options: None)
    monkeypatch.setattr(cuda, "why_not_like", lambda *arguments, **options: None)
    monkeypatch.setattr(cuda, "why_not_pooled", lambda device, variant: None)
    return started


@pytest.fixture
def launched(library, emulated, monkeypatch):
    """Layers as one call of C++, which starts emulated kernels; the names of those that started."""
    names, contexts = [], []

    def load(launch, device):
        names.append(launch.name)
        return len(names)

    @_SET_CURRENT
    def set_current(context):
        contexts.append(context)
        return 0

    @_LAUNCH_KERNEL
    def launch(function, x, y, z, threads, _, __, shared_bytes, stream, arguments, ___):
        # Each launch may be the first of its thread, which then has no context.
        if contexts != [_CONTEXT]:
            return 201
        contexts.clear()
        name = names[function - 1]
        structure = _structure_of(name).from_address(arguments[0])
        started.append(name)
        message, _ = library.start(
            Launch("", name, (x, y, z), shared_bytes, structure, threads=threads)
        )
        return 0 if message == "" and stream == 5 else 700

    started = []
    cuda_layer.plans_of.cache_clear()
    monkeypatch.setattr(cuda_layer, "function_of", load)
    functions = tuple(ctypes.cast(x, ctypes.c_void_p).value for x in (launch, set_current))
    monkeypatch.setattr(cuda_layer, "driver_functions", lambda: functions)
    monkeypatch.setattr(cuda_layer, "context_of", lambda device: _CONTEXT)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(cuda_layer, "is_there", lambda device: True)
    monkeypatch.setattr(joined, "product_dtype", lambda x: torch.bfloat16)
    yield started
    cuda_layer.plans_of.cache_clear()


_CONTEXT = 3  # of the GPU that there is not

# The driver's cuCtxSetCurrent and cuLaunchKernel.
_SET_CURRENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_UNSIGNED = [ctypes.c_uint] * 7
_LAUNCH_KERNEL = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_size_t, *_UNSIGNED),
    *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p),
)


def _structure_of(name):
    kind = name.split("<")[0]
    return KERNELS[kind].arguments if kind in KERNELS else EmbeddingArguments
