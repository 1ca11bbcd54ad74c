"""Runs of LazyConfigs."""

import argparse

from .arguments import argument_parser
from .lazy_config import load_lazy_config, tell_in_lazy_keys
from .lazy_trainer import LazyTrainer, check_calls
from .train import ConfigKind, run

__all__ = ["LAZY", "lazy_argument_parser", "run_lazy"]

LAZY = ConfigKind(load_lazy_config, check_calls, tell_in_lazy_keys, LazyTrainer)

_EPILOG = """
Values of the config are overridden by key=value, as in train.max_iter=1000; a + before the key adds
one that the config does not have, as in +model.box_reg_loss_type=giou.
"""


def lazy_argument_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of :func:`sasa_det.engine.argument_parser` for LazyConfigs.

    Args:
        description: what the command does.
    """
    parser = argument_parser()
    parser.description, parser.epilog = description, _EPILOG
    return parser


def run_lazy(args: argparse.Namespace) -> int:
    """Carry out a command line of :func:`lazy_argument_parser`, whose config runs as code.

    Args:
        args: the parsed command line.

    Returns:
        int: exit status, as of :func:`sasa_det.engine.run`.
    """
    return run(args, LAZY)
