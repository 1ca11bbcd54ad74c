#!/usr/bin/env python
"""Run ``sasa-det fetch-data`` from a checkout."""

import sys

from sasa_det_cli import run

if __name__ == "__main__":
    sys.exit(run("fetch-data"))
