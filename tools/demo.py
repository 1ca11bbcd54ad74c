#!/usr/bin/env python
"""Train attentional RetinaNets, pretrained or not, and their convolutional twin on digits."""

import argparse
import sys
from pathlib import Path

from sasa_det.engine.demo import run_demo
from sasa_det.engine.errors import USAGE_ERRORS, tell

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/demo", help="a folder that does not exist yet")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides for the detectors, KEY VALUE pairs"
    )
    args = parser.parse_args()
    try:
        run_demo(Path(__file__).parents[1] / "configs" / "Digits", Path(args.output), args.opts)
    except USAGE_ERRORS as error:
        sys.exit(tell(error))
