#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's flags and KEY VALUE overrides, see --help."""

import sys

from sasa_det.engine import argument_parser, run

if __name__ == "__main__":
    sys.exit(run(argument_parser().parse_args()))
