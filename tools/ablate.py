#!/usr/bin/env python
"""Repeat the paper's Tables 3 to 7 with a small classifier, and say which findings hold.

The table "san_relations" is of the second paper: how pixels are compared in pairwise and patchwise
attention. The tables "logits" and "optimizers" are of neither: what keeps q.k from saturating, and
what AdamW and Nesterov's accelerated gradient give, each with the best of three learning rates.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import add_study_arguments, positive_int, run_command
from sasa_det.engine.ablations import run_ablations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", default=["3", "4", "5", "6", "7"], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=positive_int, default=[1, 2, 3])
    parser.add_argument(
        "--config-file",
        help="of the small classifier, in the folder of configs; by default that of digits with a "
        "convolutional stem, and for san_relations that of animals on a SAN",
    )
    add_study_arguments(parser, "output/ablations")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE pairs")
    args = parser.parse_args()
    root, output = Path(__file__).parents[1], Path(args.output)
    print(
        run_ablations(root, output, args.tables, args.config_file, args.opts, args.seeds, args.jobs)
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
