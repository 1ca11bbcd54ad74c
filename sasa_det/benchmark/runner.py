"""The measurement of cases: time, disturbances, share of the peak and memory of each contender."""

import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..ops import gpu_timing
from .measure import Case, Result, Run, Settings, relative_spread, time_rounds
from .quiet import Watch

logger = logging.getLogger("sasa_det")

SLOW_ROUNDS = 3


def measure_cases(
    cases: Sequence[Case],
    rounds: int,
    settings: Settings,
    peaks: Mapping[torch.dtype, float],
    command: Sequence[str],
    keep: Callable[[Sequence[Case], Sequence[Result]], None],
) -> list[Result]:
    """Measure cases one after another, and log how far it is.

    Args:
        cases: what to measure.
        rounds: calls of each contender; slow ones have at most SLOW_ROUNDS.
        settings: those that the cases were made with.
        peaks: FLOPs a second of the best product in each type that the cases compute in.
        command: the words that start the benchmark's command with the same settings, for processes
            that measure memory.
        keep: is called after each case with the cases so far and their results.
    """
    results: list[Result] = []
    seconds_of_groups: dict[str, float] = {}
    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        results += _measure(case, rounds, settings, peaks, command)
        now = time.perf_counter()
        seconds_of_groups[case.group] = seconds_of_groups.get(case.group, 0) + now - began
        left = (now - start) / number * (len(cases) - number)
        keep(cases[:number], results)
        logger.info("%s: %d of %d cases, about %.0f s left.", case.name, number, len(cases), left)
    spent = ", ".join(f"{group} {value:.0f}" for group, value in seconds_of_groups.items())
    logger.info("Seconds of each group: %s.", spent)
    return results


def _measure(
    case: Case,
    rounds: int,
    settings: Settings,
    peaks: Mapping[torch.dtype, float],
    command: Sequence[str],
) -> list[Result]:
    baseline = case.contenders[0].name
    results = {c.name: Result(case.name, c.name, baseline, c.rival) for c in case.contenders}
    captured = settings.device == "cuda" and not case.waits
    runs: dict[str, Run | gpu_timing.Calls] = {}
    slow: dict[str, Run | gpu_timing.Calls] = {}
    for contender in case.contenders:
        try:
            run = gpu_timing.capture(contender.make) if captured else contender.make()
            if contender.foreign and not captured:
                run()
        except Exception as error:
            if not contender.foreign:
                raise
            results[contender.name].why_not = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        (slow if contender.slow else runs)[contender.name] = run
    for timed, times in ((runs, rounds), (slow, min(rounds, SLOW_ROUNDS))):
        watch = Watch()
        if captured:
            seconds = gpu_timing.time_rounds(timed, times)
        else:
            seconds = time_rounds(timed, times, settings.device)
        others = watch.others()
        for name, values in seconds.items():
            result = results[name]
            result.seconds, result.others = statistics.median(values), others
            result.spread = relative_spread(values)
        timed.clear()
    for contender in case.contenders:
        result = results[contender.name]
        if result.seconds is None:
            continue
        if contender.flops is not None:
            logging.disable(logging.INFO)  # of the backend for the meta tensors that count
            result.flops = contender.flops()
            logging.disable(logging.NOTSET)
            peak = peaks[contender.dtype or settings.dtype]
            result.peak_share = result.flops / result.seconds / peak
        if case.memory:
            result.memory = _memory(case, contender.name, command)
    return list(results.values())


def _memory(case: Case, contender: str, command: Sequence[str]) -> int:
    """Measure a contender's extra peak memory in a process of its own."""
    arguments = ["--cases", case.group, "--memory-of", case.name, contender]
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"The memory of {contender} was not measured: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])
