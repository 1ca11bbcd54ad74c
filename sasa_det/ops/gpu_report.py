"""What the CUDA kernels take of a GPU, what time is predicted, and what time they take.

``python -m sasa_det.ops.gpu_report`` compiles the kernels and prints a table of registers, bytes
that spill and shared memory. Where NVIDIA's disassembler is installed, which Triton brings, it adds
the instructions that a warp executes for 16 queries of a head, the wavefronts of shared memory that
they take, and the times that these predict. None of this needs a GPU. On a GPU it goes on to
measure, see :mod:`sasa_det.benchmark.gpu_measure`.

It is a command, and as those of ``tools`` it may use every part of the project.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..utils.text import markdown_table
from .cuda_compiler import CompiledKernel, CompilerError, compile_kernel
from .cuda_kernels import HEAD_WIDTHS, KERNELS, WIDEST_KERNEL, Variant
from .gpu_instructions import Work, disassembler, work_per_head
from .gpu_prediction import GPUS, WHOLE, Gpu, Times, attention, convolution, gpu_of, layers_by_size

# Of every generation of GPUs with these instructions, the one in data centres.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def _variant(head_width: int, pooled: bool = False) -> Variant:
    return Variant(torch.bfloat16, head_width, WIDEST_KERNEL, pooled=pooled)


@functools.cache
def _compiled(name: str, variant: Variant, architecture: str) -> CompiledKernel:
    return compile_kernel(KERNELS[name].header, variant.name(name), architecture)


@functools.cache
def count_work(
    name: str, head_width: int, pooled: bool = False, architecture: str = "sm_90"
) -> Work:
    """Count as :func:`work_per_head`, for bfloat16 and the widest windows."""
    variant = _variant(head_width, pooled)
    compiled = _compiled(name, variant, architecture)
    return work_per_head(compiled, variant.heads_of_block, variant.split_of(name).parts)


def resources(architectures: Sequence[str], head_widths: Sequence[int]) -> list[dict[str, object]]:
    """Compile the kernels and return a row of the table for each."""
    rows = []
    for architecture in architectures:
        for name, kernel in KERNELS.items():
            for head_width in head_widths:
                variant = _variant(head_width)
                taken = _compiled(name, variant, architecture).resources
                row = {
                    "architecture": architecture,
                    "kernel": name.removeprefix("local_attention_"),
                    "head width": head_width,
                    "threads": variant.split_of(name).threads,
                    "registers": taken.registers,
                    "spilled bytes": taken.spill_bytes,
                    "shared KiB": round(kernel.shared_bytes(variant) / 1024, 1),
                }
                if disassembler():
                    work = count_work(name, head_width, architecture=architecture)
                    row["instructions"] = round(work.instructions)
                    row["wavefronts"] = round(work.wavefronts)
                rows.append(row)
    return rows


def predict(gpu: Gpu) -> dict[str, tuple[Times, Times]]:
    """Predict the 3x3 layers of RetinaNet-50, and all of them together.

    Returns:
        dict: name of a layer, or WHOLE, to the times of convolution and attention.
    """
    work = functools.partial(count_work, architecture=gpu.architecture)
    layers, totals = {}, (Times(0, 0), Times(0, 0))
    for layer in layers_by_size():
        pair = convolution(layer, gpu), attention(layer, gpu, work)
        layers[layer.name] = pair
        totals = tuple(a + layer.count * b for a, b in zip(totals, pair, strict=True))
    return {**layers, WHOLE: totals}


def predictions(gpu: Gpu) -> list[dict[str, object]]:
    """Return a row of the table for each layer, and one for all, in microseconds."""

    def cell(times: Times) -> str:
        return f"{1e6 * times.forward:.0f} / {1e6 * times.backward:.0f}"

    return [
        {
            "GPU": gpu.name,
            "layer": name,
            "convolution": cell(conv),
            "attention": cell(attn),
            "ratio forward": f"{attn.forward / conv.forward:.2f}",
            "ratio step": f"{attn.step / conv.step:.2f}",
        }
        for name, (conv, attn) in predict(gpu).items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        UsageError: if the folder for what is measured exists already.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sasa_det.ops.gpu_report",
        description="Compile the CUDA kernels of local attention (bfloat16, 7 x 7 windows), print "
        "what they take of a GPU, predict their times and, on a GPU, measure them.",
    )
    parser.add_argument(
        "--architectures",
        nargs="+",
        metavar="sm_XY",
        help=f"to compile for: that of the GPU at hand, or {' '.join(ARCHITECTURES)} without one",
    )
    parser.add_argument("--head-widths", nargs="+", type=int, default=HEAD_WIDTHS, metavar="N")
    parser.add_argument(
        "--output", type=Path, default=Path("output/gpu"), help="new folder for what is measured"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="that the command may take; measurements that do not fit are left out",
    )
    start, options = time.monotonic(), parser.parse_args(arguments)
    measuring = torch.cuda.is_available()
    if measuring:
        from ..command_line import refuse_existing

        refuse_existing(options.output)
        gpu = gpu_of(torch.cuda.get_device_name())
        predicted_gpus = [] if gpu is None else [gpu]
        architectures = ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    else:
        predicted_gpus, architectures = GPUS, ARCHITECTURES
    try:
        _describe(options.architectures or architectures, options.head_widths, predicted_gpus)
        predicted = predict(gpu) if measuring and gpu and disassembler() else {}
    except CompilerError as error:
        if not measuring:
            raise
        print(f"\nThis is left out: {error}")  # what can be measured tells more
        predicted = {}
    if not measuring:
        print("\nNothing was measured, as PyTorch finds no GPU.")
        return
    from ..benchmark.gpu_measure import measure

    measure(options.output, start + 60 * options.minutes, gpu, predicted)


def _describe(
    architectures: Sequence[str], head_widths: Sequence[int], predicted_gpus: Sequence[Gpu]
) -> None:
    print(markdown_table(resources(architectures, head_widths)))
    if disassembler() is None:
        print("\nnvdisasm, which Triton brings, is not installed: nothing is predicted.")
    elif predicted_gpus:
        what = "forward / backward, bfloat16, batch 8, 640 x 640 images"
        print(f"\nPredicted microseconds, {what}:\n")
        print(markdown_table([row for x in predicted_gpus for row in predictions(x)]))
    else:
        print("\nNothing is predicted of this GPU.")


if __name__ == "__main__":
    from ..command_line import run_command

    sys.exit(run_command(main))
