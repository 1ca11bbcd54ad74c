"""Detectors: their data, losses on other data, and COCO's metrics."""

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    build_detection_test_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator

from ..data.coco import check_registered
from ..data.loader import build_train_loader
from ..data.mapper import DetectionMapper, build_test_mapper, build_train_mapper
from ..evaluation.coco import coco_evaluator, coco_metrics
from .task import Task

__all__ = ["DETECTION", "image_options"]


def image_options(cfg: CfgNode) -> dict[str, int | str]:
    """Return what checks of COCO-format data must know of the config."""
    mask_format = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    return {
        "max_pixels": cfg.INPUT.MAX_PIXELS,
        "mask_format": mask_format,
        "num_keypoints": num_keypoints,
    }


def _check_data(cfg: CfgNode, names: Sequence[str], training: bool) -> None:
    check_registered(names, training=training, **image_options(cfg))


def _metrics(cfg: CfgNode, class_names: Sequence[str]) -> list[str]:
    asked = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [
        f"{task}/{metric}"
        for task in asked
        if asked[task]
        for metric in coco_metrics(task, class_names)
    ]


def _build_mappers(cfg: CfgNode, eval_only: bool) -> None:
    build_test_mapper(cfg)
    if not eval_only:
        build_train_mapper(cfg)


def _test_loader(cfg: CfgNode, name: str):
    return build_detection_test_loader(cfg, name, mapper=build_test_mapper(cfg))


def _evaluator(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    return coco_evaluator(
        name,
        folder,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _validation_batches(cfg: CfgNode) -> Iterator[list[dict[str, Any]]]:
    # Test-time resizing with the annotations that detectron2's test mapper drops.
    augmentations = detection_utils.build_augmentation(cfg, is_train=False)
    mapper = DetectionMapper(cfg, is_train=True, augmentations=augmentations)
    for name in cfg.DATASETS.TEST:
        records = get_detection_dataset_dicts([name], filter_empty=False)
        yield from build_detection_test_loader(
            records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
        )


DETECTION = Task(
    evaluator_type="coco",
    metrics=_metrics,
    check_data=_check_data,
    build_mappers=_build_mappers,
    train_loader=build_train_loader,
    test_loader=_test_loader,
    evaluator=_evaluator,
    validation_batches=_validation_batches,
)
