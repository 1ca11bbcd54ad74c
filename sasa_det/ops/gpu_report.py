"""What the CUDA kernels take of a GPU, and the time that is predicted; no GPU is needed.

``python -m sasa_det.ops.gpu_report`` compiles the kernels and prints a table of registers, bytes
that spill and shared memory. Where NVIDIA's disassembler is installed, which Triton brings, it adds
the instructions that a warp executes for 16 queries of a head, and the times that they predict.
"""

import argparse
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .cuda_compiler import CompiledKernel, compile_kernel
from .cuda_kernels import HEAD_WIDTHS, KERNELS, THREADS, WIDEST_KERNEL, Variant
from .gpu_prediction import GPUS, RETINANET, Gpu, attention, convolution

# Of every generation of GPUs with these instructions, the one in data centres.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@functools.cache
def _compiled(name: str, head_width: int, architecture: str) -> CompiledKernel:
    variant = Variant(torch.bfloat16, head_width, WIDEST_KERNEL)
    return compile_kernel(KERNELS[name].header, variant.name(name), architecture)


def count_instructions(name: str, head_width: int, architecture: str) -> float:
    """Count as :func:`instructions_per_head`, for bfloat16 and the widest windows."""
    variant = Variant(torch.bfloat16, head_width, WIDEST_KERNEL)
    inner = KERNELS[name].inner_loop(variant)
    compiled = _compiled(name, head_width, architecture)
    return instructions_per_head(compiled, variant.heads_of_block, inner)


def resources(architectures: Sequence[str], head_widths: Sequence[int]) -> list[dict[str, object]]:
    """Compile the kernels and return a row of the table for each."""
    rows = []
    for architecture in architectures:
        for name, kernel in KERNELS.items():
            for head_width in head_widths:
                variant = Variant(torch.bfloat16, head_width, WIDEST_KERNEL)
                taken = _compiled(name, head_width, architecture).resources
                row = {
                    "architecture": architecture,
                    "kernel": name.removeprefix("local_attention_"),
                    "head width": head_width,
                    "registers": taken.registers,
                    "spilled bytes": taken.spill_bytes,
                    "shared KiB": round(kernel.shared_bytes(variant) / 1024, 1),
                }
                if disassembler():
                    row["instructions"] = round(count_instructions(name, head_width, architecture))
                rows.append(row)
    return rows


def predictions(gpu: Gpu) -> list[dict[str, object]]:
    """Return a row for each 3x3 layer of RetinaNet-50, and one for all, in microseconds."""
    instructions = functools.cache(
        functools.partial(count_instructions, architecture=gpu.architecture)
    )
    pairs = [(convolution(x, gpu), attention(x, gpu, instructions)) for x in RETINANET]
    # Backbone, FPN and heads have layers of the same size.
    layers = {(x.channels, x.size): pair for x, pair in zip(RETINANET, pairs, strict=True)}
    rows = []
    for (channels, size), (conv, attn) in sorted(layers.items(), key=lambda x: (x[0][0], -x[0][1])):
        times = [conv.forward, conv.backward, attn.forward, attn.backward]
        ratios = attn.forward / conv.forward, attn.step / conv.step
        rows.append(_prediction(gpu, f"{channels}@{size}", times, ratios))
    sums = [
        sum(x.count * getattr(pair[i], name) for x, pair in zip(RETINANET, pairs, strict=True))
        for i in (0, 1)
        for name in ("forward", "backward")
    ]
    ratios = sums[2] / sums[0], (sums[2] + sums[3]) / (sums[0] + sums[1])
    return [*rows, _prediction(gpu, "RetinaNet-50", sums, ratios)]


def _prediction(gpu: Gpu, layer: str, times: Sequence[float], ratios: Sequence[float]) -> dict:
    conv_forward, conv_backward, forward, backward = (round(1e6 * x) for x in times)
    return {
        "GPU": gpu.name,
        "layer": layer,
        "convolution": f"{conv_forward} / {conv_backward}",
        "attention": f"{forward} / {backward}",
        "ratio forward": f"{ratios[0]:.2f}",
        "ratio step": f"{ratios[1]:.2f}",
    }


def _print_table(rows: list[dict[str, object]]) -> None:
    for cells in [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]:
        print(f"| {' | '.join(map(str, cells))} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sasa_det.ops.gpu_report",
        description="Compile the CUDA kernels of local attention (bfloat16, 7 x 7 windows, blocks "
        f"of {THREADS} threads), print what they take of a GPU, and predict their times.",
    )
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="sm_XY")
    parser.add_argument("--head-widths", nargs="+", type=int, default=HEAD_WIDTHS, metavar="N")
    options = parser.parse_args(arguments)
    _print_table(resources(options.architectures, options.head_widths))
    if disassembler() is None:
        print("\nnvdisasm, which Triton brings, is not installed: nothing is predicted.")
        return
    print("\nPredicted microseconds, forward / backward, bfloat16, batch 8, 640 x 640 images:\n")
    _print_table([row for gpu in GPUS for row in predictions(gpu)])


if __name__ == "__main__":
    main()
