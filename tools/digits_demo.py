#!/usr/bin/env python
"""Train a convolutional RetinaNet and attentional ones, with either stem, on digits.

With MODEL.BACKBONE.NAME build_retinanet_san_fpn_backbone, they are RetinaNets on a SAN with
convolutional and with attentional FPN and heads.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/demo", help="a folder that does not exist yet")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides for the detectors, KEY VALUE pairs"
    )
    args = parser.parse_args()
    run_demo(Path(__file__).parents[1] / "configs" / "Digits", Path(args.output), args.opts)


if __name__ == "__main__":
    sys.exit(run_command(main))
