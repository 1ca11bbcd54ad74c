#!/usr/bin/env python
"""Draw where a pixel of an image looks in an attention layer, and where all look on average."""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine.visualize_attention import run_visualize_attention, visualize_attention_parser

if __name__ == "__main__":
    sys.exit(
        run_command(
            lambda: run_visualize_attention(visualize_attention_parser(__doc__).parse_args())
        )
    )
