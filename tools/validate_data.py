#!/usr/bin/env python
"""Describe a data set and its images, and list every problem in them."""

import argparse
import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.data import DatasetError
from sasa_det.data.sources import open_data
from sasa_det.data.validation import validate_coco
from sasa_det.data.validation_report import describe_report
from sasa_det.data_arguments import DATA_HELP, DEFAULT_SPLITS, words_problem
from sasa_det.utils.text import printable


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 if the data can be used, 1 if they are refused, 2 if the command "
        "line is wrong.",
    )
    metavar = ("DATA", "IMAGES|SPLIT")
    parser.add_argument("data", nargs="*", metavar=metavar, help=DATA_HELP.format(split="train"))
    use = parser.add_mutually_exclusive_group()
    for split, purpose in (("train", "training"), ("test", "evaluation")):
        use.add_argument(
            f"--{split}",
            nargs="*",
            metavar=metavar,
            help=f"check for {purpose}; the data may be given here, with the split "
            f"{DEFAULT_SPLITS[split]} by default",
        )
    parser.add_argument(
        "--masks", choices=("polygon", "bitmask"), help="check for masks of this INPUT.MASK_FORMAT"
    )
    parser.add_argument(
        "--keypoints", type=int, default=0, metavar="N", help="check for N keypoints of each object"
    )
    parser.add_argument("--pixels", action="store_true", help="decode every image as well")
    parser.add_argument("--all", action="store_true", help="list every problem and every class")
    args = parser.parse_intermixed_args()
    training = True if args.train is not None else False if args.test is not None else None
    words = [*args.data, *(args.train or args.test or [])]
    if not words:
        parser.error("no data are given")
    if problem := words_problem(words):
        parser.error(problem)

    # A reader that ends early, as in `| head`, ends it without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        json_file, images = open_data(*words, use="test" if training is False else "train")
        report = validate_coco(
            json_file,
            images,
            training=training,
            mask_format=args.masks or "",
            num_keypoints=args.keypoints,
            limit=None if args.all else 5,
            pixels=args.pixels,
        )
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except DatasetError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(describe_report(report, everything=args.all))
    return 0 if report.is_accepted(report.training) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
