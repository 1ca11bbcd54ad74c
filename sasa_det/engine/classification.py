"""Classifiers: their data, and top-1 and top-5 accuracy."""

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..data.classification import (
    build_classification_test_loader,
    build_classification_train_loader,
    build_mapper,
)
from ..data.image_folder import check_image_folders
from ..evaluation.classification import ClassificationEvaluator
from .task import Task

__all__ = ["CLASSIFICATION"]


def _metrics(cfg: CfgNode, class_names: Sequence[str]) -> list[str]:
    return ["classification/top1", "classification/top5"]


def _check_data(cfg: CfgNode, names: Sequence[str], training: bool) -> None:
    check_image_folders(names)


def _build_mappers(cfg: CfgNode, eval_only: bool) -> None:
    build_mapper(cfg, is_train=False)
    if not eval_only:
        build_mapper(cfg, is_train=True)


def _evaluator(cfg: CfgNode, name: str, folder: str) -> ClassificationEvaluator:
    return ClassificationEvaluator(
        name,
        max_unreadable=cfg.DATALOADER.SKIP_UNREADABLE,
        max_unreadable_fraction=cfg.DATALOADER.SKIP_UNREADABLE_FRACTION,
    )


def _validation_batches(cfg: CfgNode) -> Iterator[dict[str, Any]]:
    for name in cfg.DATASETS.TEST:
        for batch in build_classification_test_loader(cfg, name):
            if len(batch["label"]):
                yield batch


CLASSIFICATION = Task(
    evaluator_type="classification",
    metrics=_metrics,
    check_data=_check_data,
    build_mappers=_build_mappers,
    train_loader=build_classification_train_loader,
    test_loader=build_classification_test_loader,
    evaluator=_evaluator,
    validation_batches=_validation_batches,
)
