#!/usr/bin/env python
"""Find objects in images and videos with a trained detector, and draw and list them."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.predict import predict_parser, run_predict

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_predict(predict_parser(__doc__).parse_args())))
