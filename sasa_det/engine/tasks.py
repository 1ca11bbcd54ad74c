"""What differs between training detectors and training classifiers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import (
    build_detection_test_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from ..config.load import image_options
from ..data.classification import (
    build_classification_test_loader,
    build_classification_train_loader,
    build_mapper,
)
from ..data.coco import check_registered
from ..data.image_folder import check_image_folders
from ..data.loader import TrainLoader, build_train_loader, end_workers_with_parent
from ..data.mapper import DetectionMapper, build_test_mapper, build_train_mapper
from ..evaluation.accuracy import ClassificationEvaluator
from ..evaluation.coco import coco_evaluator, coco_metrics

__all__ = ["CLASSIFICATION", "DETECTION", "Task", "task_of"]


class Task(NamedTuple):
    """How a config's model is fed and evaluated.

    Attributes:
        evaluator_type: what data sets to test on have as their ``evaluator_type``.
        metrics: names of the metrics of an evaluation, from config and names of the classes.
        check_data: looks at the files of data sets, given config, their names and whether they
            are trained on.
        build_mappers: builds all that maps records, to tell mistakes in the config, given config
            and whether the run evaluates without training.
        train_loader: of ``DATASETS.TRAIN``, from the config.
        test_loader: of a data set, from config and its name.
        evaluator: of a data set, from config, its name and the folder for its results.
        validation_batches: of ``DATASETS.TEST``, with what the losses need.
    """

    evaluator_type: str
    metrics: Callable[[CfgNode, list[str]], list[str]]
    check_data: Callable[[CfgNode, tuple[str, ...], bool], None]
    build_mappers: Callable[[CfgNode, bool], None]
    train_loader: Callable[[CfgNode], TrainLoader]
    test_loader: Callable[[CfgNode, str], Iterable[Any]]
    evaluator: Callable[[CfgNode, str, str], DatasetEvaluator]
    validation_batches: Callable[[CfgNode], Iterable[Any]]


def _detection_check_data(cfg: CfgNode, names: Sequence[str], training: bool) -> None:
    check_registered(names, training=training, **image_options(cfg))


def _detection_metrics(cfg: CfgNode, class_names: Sequence[str]) -> list[str]:
    asked = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [
        f"{task}/{metric}"
        for task in asked
        if asked[task]
        for metric in coco_metrics(task, class_names)
    ]


def _detection_build_mappers(cfg: CfgNode, eval_only: bool) -> None:
    build_test_mapper(cfg)
    if not eval_only:
        build_train_mapper(cfg)


def _test_loader(cfg: CfgNode, name: str):
    loader = build_detection_test_loader(cfg, name, mapper=build_test_mapper(cfg))
    return end_workers_with_parent(loader)


def _detection_evaluator(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    return coco_evaluator(
        name,
        folder,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _detection_validation_batches(cfg: CfgNode) -> Iterator[list[dict[str, Any]]]:
    # Test-time resizing with the annotations that detectron2's test mapper drops.
    augmentations = detection_utils.build_augmentation(cfg, is_train=False)
    mapper = DetectionMapper(cfg, is_train=True, augmentations=augmentations)
    for name in cfg.DATASETS.TEST:
        records = get_detection_dataset_dicts([name], filter_empty=False)
        loader = build_detection_test_loader(
            records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
        )
        yield from end_workers_with_parent(loader)


DETECTION = Task(
    evaluator_type="coco",
    metrics=_detection_metrics,
    check_data=_detection_check_data,
    build_mappers=_detection_build_mappers,
    train_loader=build_train_loader,
    test_loader=_test_loader,
    evaluator=_detection_evaluator,
    validation_batches=_detection_validation_batches,
)


def _classification_metrics(cfg: CfgNode, class_names: Sequence[str]) -> list[str]:
    return ["classification/top1", "classification/top5"]


def _classification_check_data(cfg: CfgNode, names: Sequence[str], training: bool) -> None:
    check_image_folders(names)


def _classification_build_mappers(cfg: CfgNode, eval_only: bool) -> None:
    build_mapper(cfg, is_train=False)
    if not eval_only:
        build_mapper(cfg, is_train=True)


def _classification_evaluator(cfg: CfgNode, name: str, folder: str) -> ClassificationEvaluator:
    return ClassificationEvaluator(
        name,
        max_unreadable=cfg.DATALOADER.SKIP_UNREADABLE,
        max_unreadable_fraction=cfg.DATALOADER.SKIP_UNREADABLE_FRACTION,
    )


def _classification_validation_batches(cfg: CfgNode) -> Iterator[dict[str, Any]]:
    for name in cfg.DATASETS.TEST:
        for batch in build_classification_test_loader(cfg, name):
            if len(batch["label"]):
                yield batch


CLASSIFICATION = Task(
    evaluator_type="classification",
    metrics=_classification_metrics,
    check_data=_classification_check_data,
    build_mappers=_classification_build_mappers,
    train_loader=build_classification_train_loader,
    test_loader=build_classification_test_loader,
    evaluator=_classification_evaluator,
    validation_batches=_classification_validation_batches,
)


def task_of(cfg: CfgNode) -> Task:
    """Return the task of a config's meta-architecture."""
    return CLASSIFICATION if cfg.MODEL.META_ARCHITECTURE == "Classifier" else DETECTION
