#!/usr/bin/env python
"""Write the weights of a checkpoint, without the state of its training, to another file."""

import argparse
import sys

from sasa_det.checkpoint import CheckpointError, convert

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a .pth, .pkl or .pyth checkpoint")
    parser.add_argument("target", metavar="TARGET", help="the .pth file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    args = parser.parse_args()
    try:
        convert(args.source, args.target, overwrite=args.overwrite)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
