"""What differs between training detectors and training classifiers."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from ..data.loader import TrainLoader

__all__ = ["Task"]


class Task(NamedTuple):
    """How a config's model is fed and evaluated.

    Attributes:
        evaluator_type: what data sets to test on have as their ``evaluator_type``.
        metrics: names of the metrics of an evaluation, from config and names of the classes.
        check_data: looks at the files of data sets, given config, their names and whether they
            are trained on.
        build_mappers: builds all that maps records, to tell mistakes in the config, given config
            and whether the run evaluates without training.
        train_loader: of ``DATASETS.TRAIN``, from config and seed.
        test_loader: of a data set, from config and its name.
        evaluator: of a data set, from config, its name and the folder for its results.
        validation_batches: of ``DATASETS.TEST``, with what the losses need.
    """

    evaluator_type: str
    metrics: Callable[[CfgNode, list[str]], list[str]]
    check_data: Callable[[CfgNode, tuple[str, ...], bool], None]
    build_mappers: Callable[[CfgNode, bool], None]
    train_loader: Callable[[CfgNode, int], TrainLoader]
    test_loader: Callable[[CfgNode, str], Iterable[Any]]
    evaluator: Callable[[CfgNode, str, str], DatasetEvaluator]
    validation_batches: Callable[[CfgNode], Iterable[Any]]
