"""The benchmark's command: measure, print, and keep the results."""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..engine.defaults import log_to, positive_int
from ..engine.output_folder import refuse_existing
from ..errors import UsageError, print_error
from ..utils.files import write_text
from ..utils.machine import describe_machine
from .cases import GROUPS, make_cases
from .measure import (
    Case,
    Result,
    Settings,
    extra_peak_memory,
    median_seconds,
    use_exact_memory,
)
from .report import draw_results, tabulate_results

logger = logging.getLogger("sasa_det")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLOW_ROUNDS = 3


def main(configs: Path, argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command line.

    Args:
        configs: the project's folder of configs.
        argv: arguments; None takes those of the process.

    Returns:
        int: the process's exit status.
    """
    args = _parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, _DTYPES[args.dtype], args.batch, args.image_size, configs)
    groups = args.cases.split(",")
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        return print_error(
            UsageError(f"--cases takes {', '.join(GROUPS)}, got {', '.join(unknown)}.")
        )
    cases = make_cases(settings, groups)
    if args.memory_of:
        _print_memory(cases, *args.memory_of, device)
        return 0
    output = Path(args.output)
    try:
        refuse_existing(output)
    except UsageError as error:
        return print_error(error)
    log_to(None)
    command = [sys.argv[0], "--device", device, "--dtype", args.dtype]
    command += ["--batch", str(args.batch), "--image-size", str(args.image_size)]
    results: list[Result] = []
    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        results += _measure(case, args.rounds, device, command)
        spent = time.perf_counter() - start
        left = spent / number * (len(cases) - number)
        logger.info("%s: %d of %d cases, about %.0f s left.", case.name, number, len(cases), left)
    machine = describe_machine(device, args.dtype)
    table = f"{tabulate_results(cases, results)}\n\n{machine}; {_rounds(args.rounds)}.\n"
    write_text(output / "results.md", table)
    record = {"machine": machine, "results": [asdict(result) for result in results]}
    write_text(output / "results.json", json.dumps(record, indent=2))
    draw_results(cases, results, output / "results.png")
    print(f"\n{table}\nWritten to {output}: results.md, results.json, results.png")
    return 0


def _rounds(rounds: int) -> str:
    text = f"medians of {rounds} rounds"
    if rounds > _SLOW_ROUNDS:
        text += f", of {_SLOW_ROUNDS} rounds of their own for unfold and FlexAttention"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time attention side by side with convolution and with other formulations."
    )
    parser.add_argument(
        "--cases", default=",".join(GROUPS), help=f"which of {','.join(GROUPS)}; all by default"
    )
    parser.add_argument("--output", default="output/benchmark", help="new folder for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if it is available")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--batch", type=positive_int, default=1, help="images in a batch")
    parser.add_argument("--image-size", type=positive_int, default=640, help="side of the images")
    parser.add_argument("--rounds", type=positive_int, default=11, help="calls of each contender")
    # One contender in a process of its own, for the memory it takes there.
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser


def _measure(case: Case, rounds: int, device: str, command: list[str]) -> list[Result]:
    results = {c.name: Result(case.name, c.name, case.baseline) for c in case.contenders}
    runs, slow = {}, {}
    for contender in case.contenders:
        try:
            run = contender.make()
            if contender.foreign:
                run()
        except Exception as error:
            if not contender.foreign:
                raise
            results[contender.name].why_not = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        (slow if contender.slow else runs)[contender.name] = run
    seconds = median_seconds(runs, rounds, device)
    seconds.update(median_seconds(slow, min(rounds, _SLOW_ROUNDS), device))
    for name, value in seconds.items():
        results[name].seconds = value
    runs.clear()
    slow.clear()
    if case.memory:
        for name in seconds:
            results[name].memory = _memory(case, name, command)
    return list(results.values())


def _memory(case: Case, contender: str, command: list[str]) -> int:
    """Measure a contender's extra peak memory in a process of its own."""
    arguments = ["--cases", case.group, "--memory-of", case.name, contender]
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"The memory of {contender} was not measured: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def _print_memory(cases: list[Case], case_name: str, contender_name: str, device: str) -> None:
    use_exact_memory()
    (case,) = [case for case in cases if case.name == case_name]
    (contender,) = [each for each in case.contenders if each.name == contender_name]
    torch.manual_seed(0)
    print(extra_peak_memory(contender.make(), device))
