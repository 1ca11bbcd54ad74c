"""CUDA C++ compiled when it is first used, by NVRTC: no nvcc and nothing to build beforehand.

NVRTC and the driver are called through cuda-bindings, a package that PyTorch's CUDA builds bring.
Compiling takes about two seconds for a kernel and needs no GPU. Compiled kernels are kept on the
disk, in ``$XDG_CACHE_HOME/sasa_det/cuda``, ``~/.cache/sasa_det/cuda`` if that variable is not set.
"""

import ctypes
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import whole_file

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")


class CompilerError(RuntimeError):
    """A kernel that cannot be compiled or loaded, with the reason."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a GPU: registers of a thread, and bytes of it that spill."""

    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one architecture.

    Args:
        name: as in the source, with its template arguments.
        symbol: its name in ``code``.
        resources: what it takes.
        code: the machine code, a cubin.
    """

    name: str
    symbol: str
    resources: Resources
    code: bytes


@functools.cache
def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except ImportError:
        return "the package cuda-bindings, which PyTorch's CUDA builds bring, is not installed"
    except RuntimeError as error:  # raised where the library itself is not there
        return f"NVRTC cannot be loaded ({error})"
    return None


def compile_kernel(header: str, name: str, architecture: str) -> CompiledKernel:
    """Compile a kernel of ``csrc/cuda``, or read what was compiled earlier.

    Args:
        header: the file that defines it, such as "local_attention_forward.cuh".
        name: its name with template arguments, such as "kernel<Bfloat16, 32, 7>".
        architecture: of the GPU, such as "sm_90".

    Returns:
        CompiledKernel: that and what it takes of the GPU.

    Raises:
        CompilerError: if there is no compiler, or the compiler refuses the source.
    """
    if missing():
        raise CompilerError(f"{name} cannot be compiled: {missing()}.")
    path = _cached_path(header, name, architecture)
    kernel = _read(path)
    if kernel is None:
        start = time.perf_counter()
        kernel = _compile(header, name, architecture)
        seconds = time.perf_counter() - start
        logger.info("Compiled %s for %s in %.1f s.", name, architecture, seconds)
        _write(path, kernel)
    return kernel


def _compile(header: str, name: str, architecture: str) -> CompiledKernel:
    from cuda.bindings import nvrtc

    source = f"#include <{header}>\n".encode()
    program = _call(nvrtc.nvrtcCreateProgram, source, b"sasa_det.cu", 0, [], [])
    try:
        _call(nvrtc.nvrtcAddNameExpression, program, name.encode())
        options = [*_OPTIONS, f"-arch={architecture}", f"-I{SOURCES}"]
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
        _call(nvrtc.nvrtcGetProgramLog, program, log)
        messages = log.rstrip(b"\0 ").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilerError(f"{name} cannot be compiled for {architecture}: {messages}")
        code = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc.nvrtcGetCUBIN, program, code)
        symbol = _call(nvrtc.nvrtcGetLoweredName, program, name.encode()).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return CompiledKernel(name, symbol, _resources(messages), code)


def describe_versions() -> str:
    """Name the versions of NVRTC and of CUDA that the driver has."""
    from cuda.bindings import driver, nvrtc

    _, *compiler = nvrtc.nvrtcVersion()
    version = _call(driver.cuDriverGetVersion)
    of_driver = (version // 1000, version % 1000 // 10)
    names = {"NVRTC": compiler, "driver of CUDA": of_driver}
    return ", ".join(f"{name} {'.'.join(map(str, x))}" for name, x in names.items())


def _call(function, *arguments):
    """Call a function of cuda-bindings; return its one result, or None."""
    status, *results = function(*arguments)
    if status.value != 0:
        raise CompilerError(f"{function.__name__} failed with {status.name}.")
    return results[0] if results else None


def _resources(messages: str) -> Resources:
    """Read what ptxas says of the kernel, and of nothing else, in the compiler's messages."""
    registers = re.search(r"Used (\d+) registers", messages)
    spills = re.search(r"(\d+) bytes spill stores", messages)
    if registers is None or spills is None:
        raise CompilerError(f"NVRTC names no registers in its messages: {messages}")
    return Resources(int(registers[1]), int(spills[1]))


def cache_folder() -> Path:
    """Return where compiled kernels are kept, and what is known of them."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "sasa_det", "cuda")


def source_digest(*facts: object) -> str:
    """Return a name for the kernels' source, the compiler and its options, and other facts."""
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    digest = hashlib.sha256(json.dumps([facts, version, _OPTIONS]).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cached_path(header: str, name: str, architecture: str) -> Path:
    stem = re.sub(r"\W+", "-", name).strip("-")
    digest = source_digest(header, name, architecture)
    return cache_folder() / f"{stem}-{architecture}-{digest}.kernel"


# A line of json, which tells all but the code, and the code.
def _write(path: Path, kernel: CompiledKernel) -> None:
    facts = {"name": kernel.name, "symbol": kernel.symbol, **asdict(kernel.resources)}
    facts["sha256"] = hashlib.sha256(kernel.code).hexdigest()
    try:
        with whole_file(path) as part:
            part.write_bytes(json.dumps(facts).encode() + b"\n" + kernel.code)
    except OSError as error:
        logger.warning("Compiled kernels cannot be kept and take seconds in every run: %s.", error)


def _read(path: Path) -> CompiledKernel | None:
    try:
        line, code = path.read_bytes().split(b"\n", 1)
        facts = json.loads(line)
        if facts.pop("sha256") != hashlib.sha256(code).hexdigest():
            return None
        name, symbol = facts.pop("name"), facts.pop("symbol")
        return CompiledKernel(name, symbol, Resources(**facts), code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        return None


@functools.cache
def primary_context(device: int):
    """Return PyTorch's context of a GPU, a cuda.bindings.driver.CUcontext."""
    from cuda.bindings import driver

    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))


def bind_context(device: int) -> None:
    """Make PyTorch's context of a GPU current in this thread, as calls of CUDA's runtime do.

    A thread that has made no such call has none, as may be autograd's, and the driver refuses it.
    """
    from cuda.bindings import driver

    if int(_call(driver.cuCtxGetCurrent)) == 0:
        _call(driver.cuCtxSetCurrent, primary_context(device))


@functools.cache
def load_kernel(header: str, name: str, device: int, shared_bytes: int):
    """Load a kernel on a GPU, compiled for it.

    Args:
        header: as of :func:`compile_kernel`.
        name: as of :func:`compile_kernel`.
        device: the GPU's number, the current device of PyTorch, whose context is current.
        shared_bytes: the most shared memory that it will be launched with.

    Returns:
        cuda.bindings.driver.CUfunction: for :func:`launch`.
    """
    import torch
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    kernel = compile_kernel(header, name, f"sm_{major}{minor}")
    # It stays loaded, as long as the function is in use.
    module = _call(driver.cuModuleLoadData, kernel.code)
    function = _call(driver.cuModuleGetFunction, module, kernel.symbol.encode())
    attributes = driver.CUfunction_attribute
    most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call(driver.cuFuncSetAttribute, function, most, shared_bytes)
    if shared_bytes:
        # Percents: as many blocks as there is room for, and what is left to the cache.
        carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _call(driver.cuFuncSetAttribute, function, carveout, 100)
    return function


def launch(
    function,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: ctypes.Structure,
    stream: int,
) -> None:
    """Start a kernel that takes one structure; it runs when the stream comes to it.

    The context of the kernel's GPU must be current.
    """
    from cuda.bindings import driver

    # The driver reads the structure before it returns.
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    address = ctypes.addressof(pointers)
    block = (threads, 1, 1)
    _call(driver.cuLaunchKernel, function, *grid, *block, shared_bytes, stream, address, 0)
