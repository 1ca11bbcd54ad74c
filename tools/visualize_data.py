#!/usr/bin/env python
"""Draw a data set as it is annotated, or as the model is trained on it."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.visualize_data import run_visualize_data, visualize_data_parser

if __name__ == "__main__":
    parser = visualize_data_parser(__doc__)
    sys.exit(run_command(lambda: run_visualize_data(parser.parse_args())))
