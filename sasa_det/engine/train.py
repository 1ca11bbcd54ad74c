"""The commands that train and evaluate: of yaml configs, of LazyConfigs, and of classifiers."""

import argparse

from ..config.stored import is_lazy_config
from ..config_files import find_config
from .defaults import CLASSIFIER, LAZY, YAML, argument_parser, log_to, run

_EVAL_EPILOG = """
Weights and other values of the config come as KEY VALUE pairs, MODEL.WEIGHTS model_final.pth among
them, or, for a LazyConfig, as train.init_checkpoint=model_final.pth.
"""


def train_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_train` takes."""
    return argument_parser(YAML, description)


def run_train(args: argparse.Namespace) -> int:
    """Train or evaluate the detector of a yaml config; see :func:`~sasa_det.engine.run`."""
    return run(args, YAML)


def lazy_train_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_lazy_train` takes."""
    return argument_parser(LAZY, description)


def run_lazy_train(args: argparse.Namespace) -> int:
    """Train or evaluate the detector of a LazyConfig; see :func:`~sasa_det.engine.run`."""
    return run(args, LAZY)


def train_imagenet_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_train_imagenet` takes."""
    parser = argument_parser(CLASSIFIER, description)
    parser.set_defaults(config_file="ImageNet/SASA_R_50_full.yaml")
    return parser


def run_train_imagenet(args: argparse.Namespace) -> int:
    """Train or evaluate an image classifier; see :func:`~sasa_det.engine.run`."""
    return run(args, CLASSIFIER)


def eval_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_eval` takes."""
    parser = argument_parser(YAML, description)
    parser.epilog = _EVAL_EPILOG
    parser.set_defaults(eval_only=True)
    return parser


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate the model of a config of any kind, as the others do with ``--eval-only``."""
    log_to(None)
    args.config_file = find_config(args.config_file)
    lazy = bool(args.config_file) and is_lazy_config(args.config_file)
    return run(args, LAZY if lazy else YAML)
