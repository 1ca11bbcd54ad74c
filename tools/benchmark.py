#!/usr/bin/env python
"""Time attention side by side with convolution and with other formulations of attention."""

import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.benchmark import main
from sasa_det.command_line import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(__file__).resolve().parents[1] / "configs")))
