#!/usr/bin/env python
"""Describe a COCO-format json file and its images, and list every problem in them."""

import argparse
import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.data.validation import validate_coco
from sasa_det.data.validation_report import describe_report
from sasa_det.utils.text import printable


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 if the data can be used, 1 if they are refused, 2 if the command "
        "line is wrong.",
    )
    parser.add_argument("json", help="COCO instances json")
    parser.add_argument("images", help="the folder of its images")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--train", action="store_true", help="check for training")
    use.add_argument("--test", action="store_true", help="check for evaluation")
    parser.add_argument(
        "--masks", choices=("polygon", "bitmask"), help="check for masks of this INPUT.MASK_FORMAT"
    )
    parser.add_argument(
        "--keypoints", type=int, default=0, metavar="N", help="check for N keypoints of each object"
    )
    parser.add_argument("--pixels", action="store_true", help="decode every image as well")
    parser.add_argument("--all", action="store_true", help="list every problem and every class")
    args = parser.parse_args()

    # A reader that ends early, as in `| head`, ends it without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        report = validate_coco(
            args.json,
            args.images,
            training=True if args.train else False if args.test else None,
            mask_format=args.masks or "",
            num_keypoints=args.keypoints,
            limit=None if args.all else 5,
            pixels=args.pixels,
        )
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(describe_report(report, everything=args.all))
    return 0 if report.is_accepted(report.training) else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
