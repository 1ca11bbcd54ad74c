"""The benchmark's clock and scales."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from sasa_det.benchmark.measure import time_rounds

ROOT = Path(__file__).parents[2]

MEMORY = """
import torch
from sasa_det.benchmark.memory import extra_peak_memory, use_exact_memory
use_exact_memory()
kept = []
def run():
    first = torch.ones(24 << 20, dtype=torch.uint8)
    second = torch.ones(16 << 20, dtype=torch.uint8)
    del first
    kept[:] = [torch.ones(8 << 20, dtype=torch.uint8)]
print(extra_peak_memory(run, "cpu"))
from pathlib import Path
from sasa_det.benchmark.command import main
case = ["--cases", "layer", "--memory-of", "layer forward + backward", "attention"]
main(Path("configs"), [*case, "--image-size", "64"])
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


def test_medians_ignore_single_slow_calls():
    slow = iter([0.0, 0.0, 0.05, 0.0, 0.0, 0.0])
    calls = []

    def busy(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def first():
        calls.append("first")
        busy(next(slow))

    def second():
        calls.append("second")
        busy(0.01)

    seconds = time_rounds({"first": first, "second": second}, rounds=5, device="cpu")
    assert calls == ["first", "second"] * 6
    assert [len(values) for values in seconds.values()] == [5, 5]
    assert statistics.median(seconds["first"]) < 0.01 <= min(seconds["second"])
    assert max(seconds["first"]) >= 0.05
