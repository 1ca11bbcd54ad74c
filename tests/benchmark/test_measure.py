"""The benchmark's clock and scales, and its command."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sasa_det.benchmark import command
from sasa_det.benchmark.cases import make_cases
from sasa_det.benchmark.command import main
from sasa_det.benchmark.measure import median_seconds

ROOT = Path(__file__).parents[2]

MEMORY = """
import torch
from sasa_det.benchmark.measure import extra_peak_memory, use_exact_memory
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

    seconds = median_seconds({"first": first, "second": second}, rounds=5, device="cpu")
    assert calls == ["first", "second"] * 6
    assert seconds["first"] < 0.01 <= seconds["second"]


@pytest.mark.slow
def test_every_case_runs_and_is_written(tmp_path, monkeypatch):
    def cases_of(settings, groups):
        # Memory takes a process for each contender: it is measured of two in the first case alone.
        first, *others = make_cases(settings, groups)
        two = (one for one in first.contenders if one.name in ("attention", "unfold"))
        first = replace(first, baseline="attention", contenders=tuple(two))
        return [first, *(replace(case, memory=False) for case in others)]

    monkeypatch.setattr(command, "make_cases", cases_of)
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py"])  # what those processes run
    output = tmp_path / "benchmark"
    words = ["--output", str(output), "--image-size", "64", "--rounds", "1"]
    assert main(ROOT / "configs", [*words, "--cases", "layer,kernel_size"]) == 0
    record = json.loads((output / "results.json").read_text())
    by_case = {}
    for result in record["results"]:
        by_case.setdefault(result["case"], {})[result["contender"]] = result
    assert set(by_case) == {
        "layer forward",
        "layer forward + backward",
        *(f"kernel size {k}" for k in (3, 5, 7, 9, 11)),
    }
    for contenders in by_case.values():
        for name, result in contenders.items():
            assert result["baseline"] in contenders
            assert result["seconds"] or (name.startswith("HaloAttn") and result["why_not"])
    layer = by_case["layer forward"]
    # 49 offsets of 256 channels at 8x8, unfolded: twice as keys and values, and their products.
    assert layer["unfold"]["memory"] > 2 * 49 * 256 * 64 * 4 > layer["attention"]["memory"]
    table = (output / "results.md").read_text()
    assert "layer with projections, forward, 1x256x8x8" in table
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_told(tmp_path, capsys):
    configs = ROOT / "configs"
    assert main(configs, ["--cases", "op,speed"]) == 2
    assert "--cases takes op, layer, stem" in capsys.readouterr().err
    (tmp_path / "kept").touch()
    assert main(configs, ["--cases", "op", "--output", str(tmp_path)]) == 2
    assert "exists already; name another one" in capsys.readouterr().err
