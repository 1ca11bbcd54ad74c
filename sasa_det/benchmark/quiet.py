"""Whether the machine was quiet while it was measured."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from .measure import Result

# What a quiet machine stays below: the load of the minute before the start, the relative spread of
# the calls of a contender, and the processors that others keep busy while a case is measured.
LOAD_LIMIT = 0.5
SPREAD_LIMIT = 0.1
OTHERS_LIMIT = 0.1

_STAT = Path("/proc/stat")
# By how much the processor times of Linux are too coarse, in ticks for each processor.
_TICKS_OFF = 2


class Watch:
    """Sees what others do with the processors of this process, from when it is made."""

    def __init__(self):
        self._start, self._before = time.perf_counter(), _others_seconds()

    def others(self) -> float | None:
        """Return how many of the processors others kept busy on average.

        Others are other processes and, where the machine is virtual, those of its host (steal).
        None where there is no Linux to tell.
        """
        now = _others_seconds()
        if now is None or self._before is None:
            return None
        unsure = _TICKS_OFF * len(os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
        taken = now - self._before - unsure
        return max(0.0, taken) / (time.perf_counter() - self._start)


def _others_seconds() -> float | None:
    """Return the seconds that all but this process have had of its processors since they run."""
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    mine, ticks = {f"cpu{number}" for number in os.sched_getaffinity(0)}, 0
    for name, *fields in map(str.split, lines):
        if name in mine:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def is_disturbed(result: Result) -> bool:
    """Tell whether the calls of a contender, or its case, show that the machine was not quiet."""
    return (result.spread or 0) > SPREAD_LIMIT or (result.others or 0) > OTHERS_LIMIT


def describe_quiet(load: float | None, results: Sequence[Result]) -> str:
    """Say in a line whether the machine was quiet.

    Args:
        load: mean number of processes that wanted to run in the minute before the start; None if
            it is not known.
        results: what was measured.
    """
    spread = max((result.spread or 0 for result in results), default=0)
    known = [result.others for result in results if result.others is not None]
    signs = [
        "load before the start "
        + ("not known" if load is None else f"{load:.1f} (limit {LOAD_LIMIT})"),
        f"spread over rounds up to {spread:.0%} (limit {SPREAD_LIMIT:.0%} for the interquartile "
        "range over the median)",
        "processors that others kept busy "
        + (f"up to {max(known):.2f} (limit {OTHERS_LIMIT})" if known else "not known"),
    ]
    disturbed = sum(map(is_disturbed, results))
    if disturbed or (load or 0) > LOAD_LIMIT:
        verdict = f"The machine was NOT quiet, {disturbed} of {len(results)} rows have a *"
    else:
        verdict = "The machine was quiet"
    return f"{verdict}: {'; '.join(signs)}."
