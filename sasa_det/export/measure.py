"""Time and peak memory of an ONNX file on noise: ``python -m sasa_det.export.measure FILE H W``."""

import resource
import sys
import time

import numpy as np

from .formats import need


def measure(path: str, height: int, width: int, repeats: int = 5) -> str:
    """Run a file with one thread; return what it took, in words.

    The peak is that of the process and grows only: measure one file in a process.
    """
    runtime = need("onnxruntime", "measuring")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = 255 * np.random.default_rng(0).random((3, height, width), dtype=np.float32)
    loaded, seconds = _peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        session.run(None, {"image": image})
        seconds.append(time.perf_counter() - start)
    return (
        f"{path}: fastest of {repeats} {min(seconds):.2f} s, peak memory {_peak():.0f} MiB, "
        f"{loaded:.0f} MiB of it before the first image"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
