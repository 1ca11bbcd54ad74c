#!/usr/bin/env python
"""Measure CPU time and peak memory of an ONNX file on noise, with one thread of onnxruntime."""

import argparse
import resource
import time

import numpy as np
import onnxruntime


def peak() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="an ONNX file of tools/export_model.py")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("H", "W"))
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])
    image = 255 * np.random.default_rng(0).random((3, *args.size), dtype=np.float32)
    loaded, seconds = peak(), []
    for _ in range(5):
        start = time.process_time()
        session.run(None, {"image": image})
        seconds.append(time.process_time() - start)
    print(
        f"{args.file}: fastest of 5 {min(seconds):.2f} s of CPU, peak memory {peak():.0f} MiB, "
        f"{loaded:.0f} MiB of it before the first image"
    )
