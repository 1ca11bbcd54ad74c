"""Validation of data sets from a command line."""

import argparse
import signal
import sys

from ..command_line import IntermixedParser
from ..data.sources import open_data
from ..data.validation import validate_coco
from ..data.validation_report import describe_report
from ..data_arguments import DATA_HELP, DEFAULT_SPLITS, words_problem
from ..errors import DatasetError, UsageError
from ..utils.text import printable


def validate_data_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_validate_data` takes."""
    parser = IntermixedParser(
        description=description,
        epilog="Exit status: 0 if the data can be used, 1 if they are refused, 2 if the command "
        "line is wrong.",
    )
    metavar = ("DATA", "IMAGES|SPLIT")
    parser.add_argument(
        "data", nargs="*", metavar="DATA [IMAGES|SPLIT]", help=DATA_HELP.format(split="train")
    )
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
    return parser


def run_validate_data(args: argparse.Namespace) -> int:
    """Validate as a command line of :func:`validate_data_parser` says.

    Returns:
        int: exit status: 0 if the data can be used, 1 if they are refused, 2 if the json file
        cannot be read.
    """
    training = True if args.train is not None else False if args.test is not None else None
    words = [*args.data, *(args.train or args.test or [])]
    if not words:
        raise UsageError("no data are given.")
    if problem := words_problem(words):
        raise UsageError(f"{problem}.")

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
