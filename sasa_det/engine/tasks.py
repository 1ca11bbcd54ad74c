"""Which task a config is about."""

from detectron2.config import CfgNode

from .classification import CLASSIFICATION
from .detection import DETECTION
from .task import Task

__all__ = ["task_of"]


def task_of(cfg: CfgNode) -> Task:
    """Return the task of a config's meta-architecture."""
    return CLASSIFICATION if cfg.MODEL.META_ARCHITECTURE == "Classifier" else DETECTION
