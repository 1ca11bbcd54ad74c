#!/usr/bin/env python
"""Write the annotations of a YOLO, Pascal VOC, labelme or CVAT data set as a COCO json."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.convert_data import convert_data_parser, run_convert_data

if __name__ == "__main__":
    parser = convert_data_parser(__doc__)
    sys.exit(run_command(lambda: run_convert_data(parser.parse_args())))
