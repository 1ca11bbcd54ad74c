#!/usr/bin/env python
"""Say what detections on a data set got right and wrong, in numbers and pictures."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.analyze_results import analyze_results_parser, run_analyze_results

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_analyze_results(analyze_results_parser(__doc__).parse_args())))
