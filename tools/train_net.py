#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's flags and KEY VALUE overrides, see --help."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.engine import argument_parser, run
from sasa_det.engine.defaults import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: run(argument_parser().parse_args())))
