#!/usr/bin/env python
"""Compare attention with convolution on aerial photographs of trees, which are fetched."""

import argparse
import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import add_study_arguments, run_command
from sasa_det.engine.trees import compare_on_trees, tune_on_trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead, try learning rates on a part of the training photograph that is held out",
    )
    add_study_arguments(parser, "output/trees")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE pairs")
    args = parser.parse_args()
    work = tune_on_trees if args.tune else compare_on_trees
    print(work(Path(__file__).parents[1], Path(args.output), args.jobs, args.opts))


if __name__ == "__main__":
    sys.exit(run_command(main))
