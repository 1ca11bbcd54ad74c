#!/usr/bin/env python
"""Train or evaluate a detector that a LazyConfig describes, which is Python code and is executed.

Flags are those of tools/train_net.py; overrides are key=value.
"""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.defaults import LAZY, argument_parser, run

if __name__ == "__main__":
    sys.exit(run_command(lambda: run(argument_parser(LAZY, __doc__).parse_args(), LAZY)))
