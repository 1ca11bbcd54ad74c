#!/usr/bin/env python
"""Time attention side by side with convolution and with other formulations of attention."""

import sys
from pathlib import Path

from sasa_det.benchmark import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1] / "configs"))
