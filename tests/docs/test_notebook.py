"""The notebook runs from its first to its last cell, and prints what it is committed with."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quick_start.ipynb"

# Those in the two images, by their annotations.
DIGITS = [["0", "3", "4", "5", "7"], ["0", "0", "1", "2"]]


def test_the_notebook(tmp_path):
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells for output in cell["outputs"]]
    printed = "".join(
        "".join(output["text"]) for output in outputs if output.get("name") == "stdout"
    )
    assert done.stdout == printed
    assert printed.splitlines()[1:] == [str(digits) for digits in DIGITS]
    [shown] = [output["data"]["image/png"] for output in outputs if "data" in output]
    committed = base64.b64decode(shown)
    assert len(committed) < 200_000
    drawn = np.asarray(Image.open(tmp_path / "found.png"), dtype=float)
    shown = np.asarray(Image.open(io.BytesIO(committed)), dtype=float)
    # Labels and lines are drawn a little differently by other versions of matplotlib.
    assert drawn.shape == shown.shape == (512, 1024, 3)
    assert np.abs(drawn - shown).mean() < 8
