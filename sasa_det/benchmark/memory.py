"""How much memory a call takes."""

import ctypes
import gc
import re
from pathlib import Path

import torch

from .measure import Run, wait_for


def use_exact_memory() -> None:
    """Make this process give large freed blocks back at once, so that its size tells its needs.

    Only where the C library is glibc; elsewhere sizes may keep freed memory.
    """
    mmap_threshold = -3
    _of_glibc("mallopt", mmap_threshold, 1 << 16)


def extra_peak_memory(run: Run, device: str) -> int:
    """Measure how much memory a call takes at its peak beyond what was there before.

    On a CPU it is the process's resident size as Linux tells it, which sees every allocator;
    measure one call a process, after :func:`use_exact_memory`.

    Args:
        run: the call; it is made once before, so that only what every call needs counts.
        device: "cpu" or "cuda".

    Returns:
        int: bytes.
    """
    run()
    gc.collect()
    if device == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated() - before
    # What the heap has kept of small blocks would hide as much of the call's own.
    _of_glibc("malloc_trim", 0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _of_glibc(function: str, *arguments: int) -> None:
    """Call a function that C libraries other than glibc may lack, where it is there."""
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*arguments)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE).group(1)) * 1024
