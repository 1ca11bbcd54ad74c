"""The benchmark's clock and scales."""

import subprocess
import sys
from pathlib import Path

from sasa_det.benchmark.measure import time_rounds

ROOT = Path(__file__).parents[2]

# Without detectron2, which these cases do not need and which takes seconds to import.
MEMORY = """
import importlib.util
import torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
from sasa_det.benchmark.memory import extra_peak_memory, use_exact_memory
use_exact_memory()
kept = []
def run():
    first = torch.ones(24 << 20, dtype=torch.uint8)
    second = torch.ones(16 << 20, dtype=torch.uint8)
    del first
    kept[:] = [torch.ones(8 << 20, dtype=torch.uint8)]
print(extra_peak_memory(run, "cpu"))
from sasa_det.benchmark.command import benchmark_parser, run_benchmark
case = ["--cases", "layer", "--memory-of", "layer forward + backward", "attention"]
run_benchmark(benchmark_parser().parse_args([*case, "--image-size", "64"]))
"""


def test_extra_peak_memory_is_what_lives_at_once():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    exact, training = (int(line) for line in done.stdout.splitlines()[-2:])
    # 40 MiB at once; the 8 MiB that stay from the first call are part of what was there before.
    assert 39.5 < exact / 2**20 < 42
    # Queries, keys and values of 256 channels at 8x8 live until their gradients are there.
    assert training > 2 * 3 * 256 * 64 * 4


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("sasa_det.benchmark.measure.time.perf_counter", lambda: self.now)

    def run(self, seconds):
        self.now += seconds


def test_every_round_makes_each_call_once(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    slow = iter([0.5, 0.25, 0.25, 4.0, 0.25, 0.25, 0.25])

    def first():
        calls.append("first")
        clock.run(next(slow))

    def second():
        calls.append("second")
        clock.run(0.5)

    seconds = time_rounds({"first": first, "second": second}, rounds=5, device="cpu")
    # Two calls before the rounds tell how long one takes.
    assert calls == ["first"] * 2 + ["second"] * 2 + ["first", "second"] * 5
    assert seconds == {"first": [0.25, 4.0, 0.25, 0.25, 0.25], "second": [0.5] * 5}


def test_short_calls_are_made_in_a_row_after_one_that_does_not_count(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def short():
        paused = calls[-1:] != ["short"]
        calls.append("short")
        clock.run(0.25 if paused else 1 / 64)

    def long():
        calls.append("long")
        clock.run(0.5)

    seconds = time_rounds({"short": short, "long": long}, rounds=2, device="cpu")
    assert seconds == {"short": [1 / 64] * 2, "long": [0.5] * 2}
    # Four calls of 1/64 s take longer than 0.05 s.
    assert calls == ["short"] * 2 + ["long"] * 2 + (["short"] * 5 + ["long"]) * 2
