"""The benchmark's command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sasa_det.benchmark import command, models, peak
from sasa_det.benchmark.cases import make_cases
from sasa_det.benchmark.command import benchmark_parser, run_benchmark
from sasa_det.command_line import run_command

ROOT = Path(__file__).parents[2]
TWIN_CONFIG = models.twin_config


@pytest.fixture(autouse=True)
def _quick_peak_and_threads_as_before(monkeypatch):
    monkeypatch.setattr(peak, "_CALLS", 1)
    monkeypatch.setattr(peak, "_LARGE_MATRIX", {"cpu": 256})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def status(*words):
    return run_command(lambda: run_benchmark(benchmark_parser().parse_args(words)))


def run(output, *words):
    assert status("--output", str(output), "--rounds", "1", *words) == 0
    record = json.loads((output / "results.json").read_text())
    by_case = {}
    for result in record["results"]:
        by_case.setdefault(result["case"], {})[result["contender"]] = result
    return record, by_case


def test_files_and_threads(tmp_path):
    output = tmp_path / "benchmark"
    words = ["--cases", "kernel_size", "--image-size", "64", "--threads", "2"]
    record, by_case = run(output, *words)
    assert record["threads"] == torch.get_num_threads() == 2
    assert list(by_case) == [f"kernel size {k}" for k in (3, 5, 7, 9, 11)]
    rate = record["peak_flops_per_second"]["float32"]
    for k, contenders in zip((3, 5, 7, 9, 11), by_case.values(), strict=True):
        convolution, attention = contenders["k x k convolution"], contenders["attention"]
        assert attention["baseline"] == "k x k convolution" and attention["rival"] is None
        assert convolution["flops"] == 2 * k * k * 256 * 256 * 8 * 8
        assert convolution["peak_share"] == pytest.approx(
            convolution["flops"] / convolution["seconds"] / rate
        )
    table = (output / "results.md").read_text()
    assert "layer, forward, 1x256x8x8, k 11" in table
    assert ", 2 threads, float32, torch " in table
    assert f"{rate / 1e9:.0f} GFLOP/s in float32" in table
    assert "The machine was " in table
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("has", [True, False, None])
def test_bfloat16_where_the_processor_has_it(tmp_path, monkeypatch, has):
    def cases_of(settings, groups):
        case = make_cases(settings, groups)[-1]
        quick = (c for c in case.contenders if not c.slow and not c.foreign)
        return [replace(case, contenders=tuple(quick), memory=False)]

    monkeypatch.setattr(command, "make_cases", cases_of)
    monkeypatch.setattr(command, "has_bfloat16", lambda: has)
    words = ["--cases", "layer", "--image-size", "64"]
    record, by_case = run(tmp_path / "float32", *words)
    names = {"3x3 convolution", "attention"}
    peaks = {"float32"}
    if has:
        names |= {f"{name}, bfloat16" for name in names}
        peaks.add("bfloat16")
    assert set(by_case["layer forward + backward"]) == names
    assert set(record["peak_flops_per_second"]) == peaks
    told = {
        True: [],
        False: ["No rows in bfloat16: the processor does not have it."],
        None: ["No rows in bfloat16: PyTorch does not tell whether the processor has it."],
    }
    assert record["notes"][3:] == told[has]
    # There is nothing beside it in a run in bfloat16.
    record, by_case = run(tmp_path / "bfloat16", *words, "--dtype", "bfloat16")
    assert set(by_case["layer forward + backward"]) == {"3x3 convolution", "attention"}
    assert set(record["peak_flops_per_second"]) == {"bfloat16"}
    assert len(record["notes"]) == 3


WITHOUT_DETECTRON2 = """
import sys
sys.modules["detectron2"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
from dataclasses import replace
from pathlib import Path
import torch
from sasa_det.benchmark import peak
from sasa_det.benchmark.cases import make_cases
from sasa_det.benchmark.measure import Settings
from sasa_det_cli import run
peak._CALLS, peak._LARGE_MATRIX = 1, {"cpu": 256}
settings = Settings("cpu", torch.float32, 1, 64, Path("configs"), bfloat16=True)
for case in make_cases(settings, ["op", "layer", "stem", "aggregation"]):
    for contender in case.contenders:
        if not contender.foreign:
            contender.make()()
            assert contender.flops() > 0
import sasa_det.benchmark.command as command
command.make_cases = lambda *_: [replace(make_cases(settings, ["stem"])[0], memory=False)]
sys.argv = ["tools/benchmark.py", "--output", sys.argv[1]]
assert run("benchmark") == 0
sys.argv[1:] = ["--cases", "op,digits,backbone"]
sys.exit(run("benchmark"))
"""


def test_operators_layers_and_stems_run_without_detectron2(tmp_path):
    words = [sys.executable, "-c", WITHOUT_DETECTRON2, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    left_out = "Left out without detectron2: backbone, retinanet, digits, trainer, san."
    assert left_out in (tmp_path / "out" / "results.md").read_text()
    assert done.stderr.strip().splitlines()[-1] == (
        "error: --cases backbone,digits needs detectron2, which is not installed."
    )


def small_twin_config(*given):
    cfg = TWIN_CONFIG(*given)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.SASA.WIDTH_MULTIPLIER = 26, 0.25
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CONVS = 32, 1
    return cfg


@pytest.mark.slow
def test_every_layer_and_detector_runs_and_is_written(tmp_path, monkeypatch):
    def cases_of(settings, groups):
        # Memory takes a process for each contender: it is measured of two in the first case alone.
        first, *others = make_cases(settings, groups)
        two = (one for one in first.contenders if one.name in ("attention", "unfold"))
        first = replace(first, contenders=tuple(two))
        return [first, *(replace(case, memory=False) for case in others)]

    monkeypatch.setattr(command, "make_cases", cases_of)
    monkeypatch.setattr(command, "has_bfloat16", lambda: True)
    monkeypatch.setattr(models, "twin_config", small_twin_config)
    monkeypatch.setattr(models, "_DIGITS_BATCH", 2)
    monkeypatch.setattr(models, "_DIGITS_SIZE", 64)
    groups = "layer,backbone,retinanet,digits"
    words = ["--image-size", "64", "--batch", "2", "--cases", groups]
    _, by_case = run(tmp_path / "benchmark", *words)
    assert len(by_case) == 8  # four groups, each in two passes
    for contenders in by_case.values():
        for name, result in contenders.items():
            assert result["baseline"] in contenders
            assert result["seconds"] or (name.startswith("HaloAttn") and result["why_not"])
    layer = by_case["layer forward"]
    # 49 offsets of 256 channels at 2x8x8, unfolded: as keys and as values, and their products.
    assert layer["unfold"]["memory"] > 2 * 49 * 256 * 128 * 4 > layer["attention"]["memory"]
    table = (tmp_path / "benchmark" / "results.md").read_text()
    assert "layer with projections, forward, 2x256x8x8" in table


def test_bad_arguments_are_told(tmp_path, capsys):
    assert status("--cases", "op,speed") == 2
    assert "--cases takes op, layer, stem" in capsys.readouterr().err
    (tmp_path / "kept").touch()
    assert status("--cases", "op", "--output", str(tmp_path)) == 2
    assert "exists already; name another one" in capsys.readouterr().err
    for words, told in (
        (["op", "--image-size", "31"], "--image-size must be at least 32, got 31."),
        (["retinanet", "--image-size", "128"], "--cases retinanet needs --image-size above 128"),
        (["backbone", "--image-size", "32"], "--cases backbone needs --image-size above 32"),
        (["san", "--image-size", "85"], "--cases san needs --image-size above 85"),
    ):
        assert status("--output", str(tmp_path / "new"), "--cases", *words) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        status("--threads", "0")
    assert "--threads: must be an integer of at least 1, got '0'" in capsys.readouterr().err
