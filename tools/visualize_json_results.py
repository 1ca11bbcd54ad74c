#!/usr/bin/env python
"""Run ``sasa-det visualize-json-results`` from a checkout."""

import sys

from sasa_det_cli import run

if __name__ == "__main__":
    sys.exit(run("visualize-json-results"))
