"""Training of image classifiers, whose backbones detectors begin with."""

import argparse
from typing import Any

from detectron2.config import CfgNode

from .arguments import argument_parser
from .errors import UsageError
from .setup import load_config
from .train import YAML, run

__all__ = ["CLASSIFIER", "classifier_argument_parser", "run_classifier"]


def classifier_argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of :func:`sasa_det.engine.argument_parser` for image classifiers.

    Args:
        description: what the command does.

    Returns:
        argparse.ArgumentParser: with ``--data`` and ``--holdout`` in place of ``--train`` and
        ``--test``.
    """
    parser = argument_parser(coco=False)
    parser.description = description
    parser.add_argument(
        "--data",
        type=_folder,
        metavar="FOLDER",
        help="folder with train/ and val/, in each a folder of images for each class, in place of "
        "the config's data",
    )
    parser.add_argument(
        "--holdout",
        type=_share,
        metavar="SHARE",
        help="test on this share of each class of the training images, as in 0.04, always the "
        "same ones, and train on the rest",
    )
    return parser


def run_classifier(args: argparse.Namespace) -> int:
    """Carry out a command line of :func:`classifier_argument_parser`.

    Args:
        args: the parsed command line.

    Returns:
        int: exit status, as of :func:`sasa_det.engine.run`.
    """
    keys = {"DATASETS.IMAGE_FOLDER": args.data, "DATASETS.HOLDOUT": args.holdout}
    given = [str(w) for pair in keys.items() if pair[1] is not None for w in pair]
    args.opts = [*given, *args.opts]
    args.train = args.test = None
    return run(args, CLASSIFIER)


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be a folder, got an empty name")
    return text


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1, got {text!r}")
    return share


def _load(*args: Any) -> CfgNode:
    cfg = load_config(*args)
    if cfg.MODEL.META_ARCHITECTURE != "Classifier":
        raise UsageError(
            f"MODEL.META_ARCHITECTURE must be Classifier here, got {cfg.MODEL.META_ARCHITECTURE} "
            "(detectors are trained by tools/train_net.py)."
        )
    return cfg


CLASSIFIER = YAML._replace(load=_load)
