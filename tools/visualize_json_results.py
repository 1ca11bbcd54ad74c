#!/usr/bin/env python
"""Draw COCO results beside the annotations of their data set."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.visualize_json_results import (
    run_visualize_json_results,
    visualize_json_results_parser,
)

if __name__ == "__main__":
    parser = visualize_json_results_parser(__doc__)
    sys.exit(run_command(lambda: run_visualize_json_results(parser.parse_args())))
