"""The commands as processes, and the package where detectron2 is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.data import write_digits
from sasa_det.engine.demo import run_demo


def call(*words, **kwargs):
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


HIDDEN = (
    "import sys; sys.modules['detectron2'] = None; import importlib.util as u; f = u.find_spec; "
)
HIDDEN += "u.find_spec = lambda name, *a: None if name == 'detectron2' else f(name, *a); "


def test_without_detectron2_operators_and_layers_work_and_the_rest_says_what_to_do():
    result = call("-c", HIDDEN + "from sasa_det.layers import AttentionStem; import sasa_det.ops")
    assert result.returncode == 0, result.stderr
    result = call("-c", HIDDEN + "import sasa_det")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sasa_det needs detectron2, which is not installed: run ")
    result = call("-c", HIDDEN + "import sasa_det.layers; from sasa_det import add_sasa_config")
    assert "sasa_det needs detectron2" in result.stderr


def test_analyze_model():
    config = "configs/quick/retinanet_SASA.yaml"
    result = call("tools/analyze_model.py", "--config-file", config, "--size", 64, 96)
    assert result.returncode == 0, result.stderr
    assert "One image of 64 x 96" in result.stdout and "| head " in result.stdout
    result = call("tools/analyze_model.py", "--config-file", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: --config-file nowhere.yaml")


@pytest.mark.slow
def test_demo_compares_and_draws(tmp_path, capsys):
    digits = write_digits(tmp_path / "digits", num_train=8, num_val=8, image_size=64)
    opts = []
    for split, name in (("TRAIN", "train"), ("TEST", "val")):
        opts += [f"DATASETS.{split}_JSON", str(digits / f"{name}.json")]
        opts += [f"DATASETS.{split}_IMAGES", str(digits / name)]
    opts += ["SOLVER.MAX_ITER", "20", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2"]
    opts += [
        "TEST.EVAL_PERIOD",
        "10",
        "INPUT.JITTER.CROP_SIZE",
        "64",
        "DATALOADER.NUM_WORKERS",
        "0",
    ]
    opts += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"]

    output = tmp_path / "demo"
    results = run_demo(Path("configs/Digits"), output, opts)
    assert [result["model"] for result in results] == ["attention", "convolution"]
    assert results[0]["parameters"] < results[1]["parameters"]
    written = json.loads((output / "results.json").read_text())
    assert str(written) == str(results)  # as text: AP is NaN where nothing was found
    for name in (
        "results.md",
        "curves.png",
        "attention/detections.png",
        "convolution/metrics.json",
    ):
        assert (output / name).stat().st_size > 0, name
    # Each model's log is its own.
    assert "AttentionStem" not in (output / "convolution" / "log.txt").read_text()
    assert "convolution model" not in (output / "attention" / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert (output / "results.md").read_text() in printed
    with pytest.raises(Exception, match="output .* exists already; name another one"):
        run_demo(Path("configs/Digits"), output, opts)
