#!/usr/bin/env python
"""Train or evaluate a detector that a LazyConfig describes; a LazyConfig is Python code and is run.

Flags are those of tools/train_net.py; overrides are key=value.
"""

import sys

from sasa_det.engine.lazy import lazy_argument_parser, run_lazy

if __name__ == "__main__":
    sys.exit(run_lazy(lazy_argument_parser(__doc__).parse_args()))
