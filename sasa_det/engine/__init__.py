"""Training and evaluation on top of detectron2's engine."""

from .setup import UsageError, argument_parser, load_config
from .train import run, train
from .trainer import Trainer

__all__ = ["Trainer", "UsageError", "argument_parser", "load_config", "run", "train"]
