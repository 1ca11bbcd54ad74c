#!/usr/bin/env python
"""Print a model's parameters and FLOPs by part, or the paper's tables beside our counts."""

import argparse
import sys

from sasa_det.engine import load_config
from sasa_det.engine.arguments import positive_int
from sasa_det.engine.errors import USAGE_ERRORS, tell
from sasa_det.engine.model_check import check_model
from sasa_det.modeling.complexity import count_config
from sasa_det.modeling.report import paper_report, parts_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="FILE", help="analyze the model of this config")
    what.add_argument("--paper", action="store_true", help="count the models of the paper's tables")
    parser.add_argument(
        "--size",
        type=positive_int,
        nargs=2,
        default=(640, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image in pixels, 640 640 by default",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE pairs")
    args = parser.parse_args()
    try:
        if args.paper:
            print(paper_report())
        else:
            cfg = load_config(args.config_file, args.opts)
            check_model(cfg, eval_only=True)
            print(parts_report(count_config(cfg, *args.size), *args.size))
    except (*USAGE_ERRORS, ValueError) as error:
        sys.exit(tell(error))
