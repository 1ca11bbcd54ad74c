"""Time and memory of a training step of the models on digits, as the benchmark measures them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError

_CASE = "digits RetinaNet training step"
# The rows of the benchmark that are the models as they are trained here.
_ROWS = {
    "convolution": "convolutional, tuned",
    "attention, convolutional stem": "attentional, convolutional stem",
    "attention": "attentional",
}


def measure_steps(root: Path, output: Path, device: str) -> dict[str, tuple[float, float]]:
    """Measure a training step of every model, unless that was done; nothing else should run.

    Args:
        root: the project's folder, with tools/.
        output: folder of the benchmark's results.
        device: "cpu" or "cuda".

    Returns:
        dict[str, tuple[float, float]]: seconds and MiB by model, of a batch of 8 images.

    Raises:
        RuntimeError: if the benchmark fails.
        UsageError: if what ``output`` holds are not its results for all of the models.
    """
    results = output / "results.json"
    if not results.exists():
        benchmark = [sys.executable, str(root / "tools" / "benchmark.py")]
        options = ["--cases", "digits", "--device", device, "--output", str(output)]
        if subprocess.run([*benchmark, *options], check=False).returncode:
            raise RuntimeError(f"The benchmark of the digits models, {' '.join(options)}, failed.")
    measured = {
        row["contender"]: row
        for row in json.loads(results.read_text())["results"]
        if row["case"] == _CASE
    }
    for row in _ROWS.values():
        if row not in measured or measured[row]["memory"] is None:
            raise UsageError(f"{results} has no time and memory of {row!r}; remove that folder.")
    return {model: _seconds_and_mib(measured[row]) for model, row in _ROWS.items()}


def _seconds_and_mib(row: Mapping[str, float]) -> tuple[float, float]:
    return row["seconds"], row["memory"] / 2**20
