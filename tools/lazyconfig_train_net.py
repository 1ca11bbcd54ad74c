#!/usr/bin/env python
"""Train or evaluate a detector that a LazyConfig describes; a LazyConfig is Python code and is run.

Flags are those of tools/train_net.py; overrides are key=value.
"""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.engine.defaults import lazy_argument_parser, run_command, run_lazy

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_lazy(lazy_argument_parser(__doc__).parse_args())))
