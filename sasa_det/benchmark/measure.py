"""What a benchmark measures, and how."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Run = Callable[[], object]


def median_seconds(runs: dict[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Time calls side by side.

    Every round makes each call once, so that what else the machine does falls on all alike.

    Args:
        runs: name to call; each is made once before the rounds.
        rounds: number of rounds.
        device: "cpu" or "cuda", which is waited for.

    Returns:
        dict[str, float]: name to the median of its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
        _wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait(device)
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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share.

    Attributes:
        device: "cpu" or "cuda".
        dtype: type of features and weights.
        batch: images in a batch.
        image_size: side of the square images in pixels; features are those of stride 8.
        configs: the project's folder of configs.
    """

    device: str
    dtype: torch.dtype
    batch: int
    image_size: int
    configs: Path

    def features(self, channels: int, size: int) -> Tensor:
        shape = (self.batch, channels, size, size)
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)


@dataclass(frozen=True)
class Contender:
    """One way of doing what a case measures.

    Attributes:
        name: as it stands in the table.
        make: builds everything and returns the call to measure.
        foreign: whether it is somebody else's, which may be absent or not run here.
        slow: whether it is many times slower than the others and measured in fewer rounds.
    """

    name: str
    make: Callable[[], Run]
    foreign: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Case:
    """Ways to do one thing; ratios are to the contender named ``baseline``.

    Attributes:
        group: what ``--cases`` selects it by.
        name: unique name.
        title: what is done, with sizes.
        baseline: name of the contender that the others are compared with.
        contenders: the ways.
        memory: whether peak memory is measured too.
        at: place on the axis of a growth case, a kernel size or an image size.
    """

    group: str
    name: str
    title: str
    baseline: str
    contenders: tuple[Contender, ...]
    memory: bool = False
    at: int | None = None


@dataclass
class Result:
    """What was measured of one contender.

    Attributes:
        case: name of the case.
        contender: name of the contender.
        baseline: name of the contender it is compared with.
        seconds: median of a call; None if it did not run.
        memory: extra bytes of a call at its peak; None if not measured.
        why_not: why it did not run, or None.
    """

    case: str
    contender: str
    baseline: str
    seconds: float | None = None
    memory: int | None = None
    why_not: str | None = None
