#!/usr/bin/env python
"""Export a trained model as TorchScript, torch.export or ONNX, to run without this package."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.export import export_parser, run_export

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_export(export_parser(__doc__).parse_args())))
