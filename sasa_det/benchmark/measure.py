"""What a benchmark measures, and how long its calls take."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Run = Callable[[], object]

_SECONDS_OF_ROUND = 0.05  # that calls take at least in a round


def time_rounds(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Time calls side by side, by the clock of the host.

    Every round makes each call, so that what else the machine does falls on all alike. A short
    call is made once more, before, and then several times in a row, because the first parallel
    call after a pause waits until the other threads are awake. On GPUs, what a CUDA graph can hold
    is timed by :func:`sasa_det.ops.gpu_timing.time_rounds` instead.

    Args:
        runs: name to call; each is made once before the rounds.
        rounds: number of rounds.
        device: "cpu" or "cuda", which is waited for.

    Returns:
        dict[str, list[float]]: name to the seconds of a call in each round.
    """

    def time_calls(run: Run, count: int) -> float:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait_for(device)
        return (time.perf_counter() - start) / count

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts = {}
    for name, run in runs.items():
        run()
        counts[name] = max(1, math.ceil(_SECONDS_OF_ROUND / time_calls(run, 1)))
    for _ in range(rounds):
        for name, run in runs.items():
            if counts[name] > 1:
                run()
            seconds[name].append(time_calls(run, counts[name]))
    return seconds


def relative_spread(values: Sequence[float]) -> float:
    """Return the interquartile range of values over their median; 0 of a single one."""
    if len(values) < 2:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / median


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
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
        bfloat16: whether layers and detectors run in bfloat16 as well, under autocast.
    """

    device: str
    dtype: torch.dtype
    batch: int
    image_size: int
    configs: Path
    bfloat16: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """The layout of maps and weights, in which tensor cores of GPUs read them."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.channels_last if self.device == "cuda" and half else torch.contiguous_format

    def features(self, channels: int, size: int) -> Tensor:
        shape = (self.batch, channels, size, size)
        features = torch.randn(shape, device=self.device, dtype=self.dtype)
        return features.to(memory_format=self.layout)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype, memory_format=self.layout)

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager:
        """Return a context in which products are computed in ``dtype``, if it is one."""
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype)


@dataclass(frozen=True)
class Contender:
    """One way of doing what a case measures.

    Attributes:
        name: as it stands in the table.
        make: builds everything and returns the call to measure.
        rival: the contender of the second ratio, if there is one.
        flops: counts the floating-point operations of a call; None where they are not known.
        dtype: what autocast computes products in, if it does.
        foreign: whether it is somebody else's, which may be absent or not run here.
        slow: whether it is many times slower than the others and measured in fewer rounds.
    """

    name: str
    make: Callable[[], Run]
    rival: str | None = None
    flops: Callable[[], int] | None = None
    dtype: torch.dtype | None = None
    foreign: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Case:
    """Ways to do one thing; ratios are to the first of them.

    Attributes:
        group: what ``--cases`` selects it by.
        name: unique name.
        title: what is done, with sizes.
        contenders: the ways, the baseline first.
        memory: whether peak memory is measured too.
        at: place on the axis of a growth case, a kernel size or an image size.
        waits: whether calls wait for what they compute, as for losses and boxes of detectors. No
            CUDA graph can hold them.
    """

    group: str
    name: str
    title: str
    contenders: tuple[Contender, ...]
    memory: bool = False
    at: int | None = None
    waits: bool = False


PASSES = {"forward": False, "forward + backward": True}


def cases_of_passes(
    group: str,
    name: str,
    title: str,
    contenders: Callable[[bool], Sequence[Contender]],
    passes: dict[str, bool] = PASSES,
    memory: bool = True,
    waits: bool = False,
) -> list[Case]:
    """Return a case for each of the passes, by name.

    Args:
        group, memory, waits: see :class:`Case`.
        name: of the cases, before the name of the pass.
        title: ``{}`` in it stands for the pass.
        contenders: makes them for training or not.
        passes: name to whether it is training.
    """
    return [
        Case(
            *(group, f"{name} {what}", title.format(what), tuple(contenders(training)), memory),
            waits=waits,
        )
        for what, training in passes.items()
    ]


@dataclass
class Result:
    """What was measured of one contender.

    Attributes:
        case: name of the case.
        contender: name of the contender.
        baseline: name of the contender that the first ratio is to.
        rival: name of the contender that the second ratio is to, or None.
        seconds: median of a call; None if it did not run.
        spread: interquartile range of the calls over their median.
        others: mean number of processors that others kept busy meanwhile; None if not known.
        flops: floating-point operations of a call; None if not counted.
        peak_share: FLOPs a second over those of the best product; None if not counted.
        memory: extra bytes of a call at its peak; None if not measured.
        why_not: why it did not run, or None.
    """

    case: str
    contender: str
    baseline: str
    rival: str | None = None
    seconds: float | None = None
    spread: float | None = None
    others: float | None = None
    flops: int | None = None
    peak_share: float | None = None
    memory: int | None = None
    why_not: str | None = None
