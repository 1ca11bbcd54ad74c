"""What differs between training detectors and training classifiers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    build_detection_test_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import DatasetEvaluator

from ..config.load import image_options
from ..data.classification import (
    ClassificationMapper,
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


class Task(ABC):
    """How the model of a config is fed and evaluated.

    Attributes:
        evaluator_type: what data sets to test on have as their ``evaluator_type``.
    """

    evaluator_type: str

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config with sasa_det's keys.
        """
        self.cfg = cfg

    @abstractmethod
    def metrics(self, class_names: Sequence[str]) -> list[str]:
        """Name the metrics of an evaluation on a data set with these classes."""

    @abstractmethod
    def check_data(self, names: Sequence[str], training: bool) -> None:
        """Look at the files of data sets that are trained or tested on."""

    @abstractmethod
    def build_mapper(self, is_train: bool) -> Any:
        """Build the mapper of ``DATASETS.TRAIN`` or of ``DATASETS.TEST``."""

    @abstractmethod
    def train_loader(self) -> TrainLoader:
        """Build the loader of ``DATASETS.TRAIN``."""

    @abstractmethod
    def test_loader(self, name: str) -> Iterable[Any]:
        """Build the loader of a data set to test on."""

    @abstractmethod
    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        """Build the evaluator of a data set, which writes its results into a folder."""

    @abstractmethod
    def validation_batches(self) -> Iterator[Any]:
        """Yield the batches of ``DATASETS.TEST`` with what the losses need."""


class Detection(Task):
    """Detectors, on data sets with boxes."""

    evaluator_type = "coco"

    def metrics(self, class_names: Sequence[str]) -> list[str]:
        model = self.cfg.MODEL
        asked = {"bbox": True, "segm": model.MASK_ON, "keypoints": model.KEYPOINT_ON}
        tasks = [task for task in asked if asked[task]]
        return [f"{task}/{name}" for task in tasks for name in coco_metrics(task, class_names)]

    def check_data(self, names: Sequence[str], training: bool) -> None:
        check_registered(names, training=training, **image_options(self.cfg))

    def build_mapper(self, is_train: bool) -> DetectionMapper:
        return build_train_mapper(self.cfg) if is_train else build_test_mapper(self.cfg)

    def train_loader(self) -> TrainLoader:
        return build_train_loader(self.cfg)

    def test_loader(self, name: str) -> Iterable[Any]:
        mapper = self.build_mapper(is_train=False)
        return end_workers_with_parent(build_detection_test_loader(self.cfg, name, mapper=mapper))

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        return coco_evaluator(
            name,
            folder,
            max_dets_per_image=self.cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=self.cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def validation_batches(self) -> Iterator[list[dict[str, Any]]]:
        # Test-time resizing with the annotations that detectron2's test mapper drops.
        augmentations = detection_utils.build_augmentation(self.cfg, is_train=False)
        mapper = DetectionMapper(self.cfg, is_train=True, augmentations=augmentations)
        for name in self.cfg.DATASETS.TEST:
            loader = build_detection_test_loader(
                get_detection_dataset_dicts([name], filter_empty=False),
                mapper=mapper,
                num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            )
            yield from end_workers_with_parent(loader)


class Classification(Task):
    """Image classifiers, on folders of images."""

    evaluator_type = "classification"

    def metrics(self, class_names: Sequence[str]) -> list[str]:
        return ["classification/top1", "classification/top5"]

    def check_data(self, names: Sequence[str], training: bool) -> None:
        check_image_folders(names)

    def build_mapper(self, is_train: bool) -> ClassificationMapper:
        return build_mapper(self.cfg, is_train=is_train)

    def train_loader(self) -> TrainLoader:
        return build_classification_train_loader(self.cfg)

    def test_loader(self, name: str) -> Iterable[Any]:
        return build_classification_test_loader(self.cfg, name)

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        return ClassificationEvaluator(
            name,
            max_unreadable=self.cfg.DATALOADER.SKIP_UNREADABLE,
            max_unreadable_fraction=self.cfg.DATALOADER.SKIP_UNREADABLE_FRACTION,
        )

    def validation_batches(self) -> Iterator[dict[str, Any]]:
        for name in self.cfg.DATASETS.TEST:
            yield from (batch for batch in self.test_loader(name) if len(batch["label"]))


def task_of(cfg: CfgNode) -> Task:
    """Return the task of a config's meta-architecture."""
    kind = Classification if cfg.MODEL.META_ARCHITECTURE == "Classifier" else Detection
    return kind(cfg)
