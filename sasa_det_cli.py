"""The commands of sasa_det: ``sasa-det COMMAND ...``, and what the scripts in tools/ run.

This module lies beside the package and not in it, because importing sasa_det takes seconds: the
list of commands needs nothing of it, and Ctrl-C ends a command even while it is imported.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from importlib.metadata import version

# Module and summary of each command. The module has two functions, as for visualize-data:
# visualize_data_parser(description) returns the argument parser, and run_visualize_data(args) does
# the work and returns the exit status, None for 0.
COMMANDS = {
    "train": ("sasa_det.engine.train", "Train or evaluate a detector, with detectron2's flags."),
    "train-imagenet": (
        "sasa_det.engine.train",
        "Train or evaluate an image classifier, with detectron2's flags.",
    ),
    "lazy-train": (
        "sasa_det.engine.train",
        "Train or evaluate the detector of a LazyConfig, which is executed.",
    ),
    "eval": ("sasa_det.engine.train", "Evaluate a model on the test data of its config."),
    "predict": (
        "sasa_det.engine.predict",
        "Find objects in images and videos, and draw and list them.",
    ),
    "export": ("sasa_det.engine.export", "Export a model as TorchScript, torch.export or ONNX."),
    "benchmark": (
        "sasa_det.benchmark.command",
        "Time attention beside convolution and other formulations.",
    ),
    "convert-checkpoint": (
        "sasa_det.engine.convert_checkpoint",
        "Write the backbone of a checkpoint to a file to start from.",
    ),
    "analyze-model": (
        "sasa_det.engine.analyze_model",
        "Count parameters and FLOPs of a model or of the paper's models.",
    ),
    "analyze-results": (
        "sasa_det.engine.analyze_results",
        "Say what detections on a data set got right and wrong.",
    ),
    "probe-robustness": (
        "sasa_det.engine.probe_robustness",
        "Measure how accurate classifiers stay on rotated, flipped and attacked images.",
    ),
    "visualize-data": (
        "sasa_det.engine.visualize_data",
        "Draw a data set as annotated, or as the model is trained on it.",
    ),
    "visualize-json-results": (
        "sasa_det.engine.visualize_json_results",
        "Draw COCO results beside the annotations of their data set.",
    ),
    "visualize-attention": (
        "sasa_det.engine.visualize_attention",
        "Draw where a pixel looks in an attention layer, by head.",
    ),
    "validate-data": (
        "sasa_det.engine.validate_data",
        "Describe a data set and its images, and list every problem in them.",
    ),
    "convert-data": (
        "sasa_det.engine.convert_data",
        "Write the annotations of a YOLO, Pascal VOC, labelme or CVAT data set as COCO json.",
    ),
    "tile-data": (
        "sasa_det.engine.tile_data",
        "Cut a data set of large images into tiles to train on.",
    ),
    "fetch-data": (
        "sasa_det.engine.fetch_data",
        "Fetch the data set animals or trees from the package index.",
    ),
}

_EPILOG = "`%(prog)s COMMAND --help` lists the arguments of a command."


def restart_in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale is not UTF-8.

    Libraries open text files in the encoding of the locale.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that it starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run(name: str) -> int:
    """Run a command with the arguments in ``sys.argv``.

    Args:
        name: of one of :data:`COMMANDS`.

    Returns:
        int: exit status.
    """
    restart_in_utf8()  # before the imports, which take seconds
    # Until run_command takes Ctrl-C over.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    module, summary = COMMANDS[name]
    try:
        functions = vars(importlib.import_module(module))
        from sasa_det.command_line import run_command
    except ImportError as error:
        if error.name != "detectron2":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    prefix = name.replace("-", "_")
    make_parser, work = functions[f"{prefix}_parser"], functions[f"run_{prefix}"]
    return run_command(lambda: work(make_parser(summary).parse_args()))


def main() -> int:
    """Run ``sasa-det``.

    Returns:
        int: exit status.
    """
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    description = ["Detection with stand-alone self-attention.", "", "commands:", *rows]
    parser = argparse.ArgumentParser(
        prog="sasa-det",
        usage="%(prog)s [--help] [--version] COMMAND ...",
        description="\n".join(description),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sasa_det {version('sasa_det')}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2]).command
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(COMMANDS)}."
        parser.error(f"the command {name!r} does not exist{hint}")
    # What argparse, and detectron2's examples in the help of a training, call the program.
    sys.argv[:2] = [f"sasa-det {name}"]
    return run(name)


if __name__ == "__main__":
    sys.exit(main())
