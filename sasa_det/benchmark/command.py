"""The benchmark's command: measure, print, and keep the results."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import sasa_det_cli

from ..command_line import positive_int, refuse_existing
from ..config_files import CONFIGS
from ..errors import UsageError
from ..utils.files import write_text
from ..utils.machine import describe_machine
from .cases import GROUPS, choose_groups, groups_without_detectron2, make_cases
from .measure import Case, Result, Settings
from .memory import extra_peak_memory, use_exact_memory
from .peak import has_bfloat16, peak_rate
from .quiet import describe_quiet
from .report import draw_results, tabulate_results
from .runner import SLOW_ROUNDS, measure_cases

logger = logging.getLogger("sasa_det")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST_SIZE = 32  # the stride of the smallest features


def run_benchmark(args: argparse.Namespace) -> None:
    """Measure as a command line of :func:`benchmark_parser` says.

    Raises:
        UsageError: in one sentence, before anything is measured.
    """
    settings, notes = _settings(args)
    output = Path(args.output)
    if args.image_size < _LEAST_SIZE:
        raise UsageError(f"--image-size must be at least {_LEAST_SIZE}, got {args.image_size}.")
    cases = make_cases(settings, choose_groups(args.cases))
    if not args.memory_of:
        refuse_existing(output)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = settings.device == "cuda"  # convolutions at their best
    if args.memory_of:
        _print_memory(cases, *args.memory_of, settings.device)
        return
    load = os.getloadavg()[0]
    _log_to_terminal()
    for note in notes:
        logger.info(note)
    peaks = _measure_peaks(settings)
    # What the processes that measure memory are called with.
    command = [
        sasa_det_cli.__file__,
        "benchmark",
        "--device",
        settings.device,
        "--dtype",
        args.dtype,
    ]
    command += ["--batch", str(args.batch), "--image-size", str(args.image_size)]
    command += ["--threads", str(torch.get_num_threads())]
    machine = describe_machine(settings.device, args.dtype)
    report = _Report(output, machine, args.rounds, load, peaks, notes)
    results = measure_cases(cases, args.rounds, settings, peaks, command, report.write)
    draw_results(cases, results, output / "results.png")
    print(f"\n{report.table}\nWritten to {output}: results.md, results.json, results.png")


@dataclass
class _Report:
    """The numbers of a run, which are written anew after each case, so that none is lost."""

    output: Path
    machine: str
    rounds: int
    load: float
    peaks: dict[torch.dtype, float]
    notes: list[str]
    table: str = ""

    def write(self, cases: Sequence[Case], results: Sequence[Result]) -> None:
        notes = [
            f"{self.machine}; {_rounds(self.rounds)}.",
            _describe_peaks(self.peaks),
            describe_quiet(self.load, results),
            *self.notes,
        ]
        self.table = "\n\n".join([tabulate_results(cases, results), *notes]) + "\n"
        write_text(self.output / "results.md", self.table)
        record = {
            "machine": self.machine,
            "threads": torch.get_num_threads(),
            "load_before": self.load,
            "peak_flops_per_second": {_name(dtype): rate for dtype, rate in self.peaks.items()},
            "notes": notes,
            "results": [asdict(result) for result in results],
        }
        write_text(self.output / "results.json", json.dumps(record, indent=2))


def benchmark_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_benchmark` takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--cases", help=f"which of {','.join(GROUPS)}; by default all that need no missing package"
    )
    parser.add_argument("--output", default="output/benchmark", help="new folder for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if it is available")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--batch", type=positive_int, default=1, help="images in a batch")
    parser.add_argument("--image-size", type=positive_int, default=640, help="side of the images")
    parser.add_argument("--rounds", type=positive_int, default=11, help="calls of each contender")
    parser.add_argument(
        "--threads", type=positive_int, help="of PyTorch on the CPU; as many as it takes by default"
    )
    # One contender in a process of its own, for the memory it takes there.
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _settings(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Return the settings of a run, and sentences on what it leaves out and why."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    notes, in_bfloat16 = [], False
    missing = groups_without_detectron2()
    if missing and args.cases is None:
        notes.append(f"Left out without detectron2: {', '.join(missing)}.")
    if device == "cpu" and args.dtype == "float32":
        known = has_bfloat16()
        in_bfloat16 = bool(known)
        if known is None:
            notes.append("No rows in bfloat16: PyTorch does not tell whether the processor has it.")
        elif not known:
            notes.append("No rows in bfloat16: the processor does not have it.")
    dtype = _DTYPES[args.dtype]
    return Settings(device, dtype, args.batch, args.image_size, CONFIGS, in_bfloat16), notes


def _measure_peaks(settings: Settings) -> dict[torch.dtype, float]:
    """Return the FLOPs a second of the best product in each type that the run computes in."""
    dtypes = [settings.dtype, *([torch.bfloat16] if settings.bfloat16 else [])]
    peaks = {dtype: peak_rate(settings.device, dtype) for dtype in dtypes}
    logger.info(_describe_peaks(peaks))
    return peaks


def _describe_peaks(peaks: dict[torch.dtype, float]) -> str:
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {_name(dtype)}" for dtype, rate in peaks.items()
    )
    return f"Peak, the best product of this run: {rates}."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounds(rounds: int) -> str:
    text = f"medians of {rounds} rounds"
    if rounds > SLOW_ROUNDS:
        text += f", of {SLOW_ROUNDS} rounds of their own for unfold and FlexAttention"
    return text


def _print_memory(cases: list[Case], case_name: str, contender_name: str, device: str) -> None:
    use_exact_memory()
    (case,) = [case for case in cases if case.name == case_name]
    (contender,) = [each for each in case.contenders if each.name == contender_name]
    torch.manual_seed(0)
    print(extra_peak_memory(contender.make(), device))
