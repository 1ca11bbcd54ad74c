"""Training and evaluation on top of detectron2's engine."""

from .arguments import argument_parser
from .errors import UsageError
from .setup import load_config
from .train import run, train
from .trainer import Trainer

__all__ = ["Trainer", "UsageError", "argument_parser", "load_config", "run", "train"]
