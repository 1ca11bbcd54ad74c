#!/usr/bin/env python
"""Tell what a COCO-format json and its images hold, and all that is wrong with them."""

import argparse
import signal
import sys

from sasa_det.data.report import describe_report
from sasa_det.data.validation import validate_coco

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 without errors, 1 if the data have errors, 2 for a wrong command.",
    )
    parser.add_argument("json", help="COCO instances json")
    parser.add_argument("images", help="the folder of its images")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--train", action="store_true", help="check for training")
    use.add_argument("--test", action="store_true", help="check for evaluation")
    parser.add_argument(
        "--masks", choices=("polygon", "bitmask"), help="check for masks of this INPUT.MASK_FORMAT"
    )
    parser.add_argument("--pixels", action="store_true", help="decode every image as well")
    parser.add_argument("--all", action="store_true", help="list every problem and every class")
    args = parser.parse_args()

    # Ctrl-C and a reader that ends early, as in `| head`, end it without a traceback; and names may
    # have characters that the terminal lacks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        report = validate_coco(
            args.json,
            args.images,
            training=True if args.train else False if args.test else None,
            mask_format=args.masks or "",
            limit=None if args.all else 5,
            pixels=args.pixels,
        )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(describe_report(report, everything=args.all))
    sys.exit(1 if report.count("error") else 0)
