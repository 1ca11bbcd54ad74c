#!/usr/bin/env python
"""Run ``sasa-det probe-robustness`` from a checkout."""

import sys

from sasa_det_cli import run

if __name__ == "__main__":
    sys.exit(run("probe-robustness"))
