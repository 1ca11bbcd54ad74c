"""What a number was measured on."""

import platform
import time
from pathlib import Path

import torch


def processor_name() -> str:
    """Return the model name of the processor, or its architecture if it is not known."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine(device: str, dtype: str | None = None) -> str:
    """Say in a line what runs, on what, and when.

    Args:
        device: "cpu" or "cuda".
        dtype: type of the numbers, if it is worth saying.

    Returns:
        str: the processor or GPU, threads, torch's version, the date.
    """
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{processor_name()}, {torch.get_num_threads()} threads"
    parts = [machine, *([dtype] if dtype else []), f"torch {torch.__version__}"]
    return ", ".join([*parts, time.strftime("%Y-%m-%d")])
