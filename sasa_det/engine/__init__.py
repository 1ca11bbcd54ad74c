"""Training, evaluation and prediction on top of detectron2's engine."""

from ..config.load import load_config
from ..errors import UsageError
from .defaults import argument_parser, run
from .predictor import Predictor
from .trainer import Trainer

__all__ = ["Predictor", "Trainer", "UsageError", "argument_parser", "load_config", "run"]
