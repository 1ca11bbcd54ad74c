"""What there is to run on, and what a number was measured on."""

import platform
import re
import time
from pathlib import Path

import torch


def default_device() -> str:
    """Return "cuda" if there is a GPU that torch can use, or else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine(device: str, dtype: str | None = None) -> str:
    """Say in a line what runs, on what, and when.

    Args:
        device: "cpu" or "cuda".
        dtype: type of the numbers, if it is worth saying.

    Returns:
        str: the processor's model as Linux tells it, else its architecture, and threads, or the
        GPU; torch's version, the date.
    """
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        model = re.search("^model name.*: *(.*)", text, re.MULTILINE)
        processor = model[1] if model else platform.processor() or platform.machine()
        threads = torch.get_num_threads()
        machine = f"{processor}, {threads} thread{'s' * (threads > 1)}"
    parts = [machine, *([dtype] if dtype else []), f"torch {torch.__version__}"]
    return ", ".join([*parts, time.strftime("%Y-%m-%d")])
