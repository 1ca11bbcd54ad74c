#!/usr/bin/env python
"""Train or evaluate an image classifier: detectron2's flags and KEY VALUE overrides."""

import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.defaults import CLASSIFIER, argument_parser, run

_DEFAULT = Path(__file__).parents[1] / "configs" / "ImageNet" / "SASA_R_50_full.yaml"

if __name__ == "__main__":
    parser = argument_parser(CLASSIFIER, __doc__)
    parser.set_defaults(config_file=str(_DEFAULT))
    sys.exit(run_command(lambda: run(parser.parse_args(), CLASSIFIER)))
