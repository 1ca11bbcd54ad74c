#!/usr/bin/env python
"""Compare attention with convolution on digits: rates tuned alike, several seeds, curves."""

import argparse
import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import add_study_arguments, run_command
from sasa_det.engine.evidence import Budget, gather_evidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_study_arguments(parser, "output/evidence")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    print(gather_evidence(root, Path(args.output), args.jobs, Budget()))


if __name__ == "__main__":
    sys.exit(run_command(main))
