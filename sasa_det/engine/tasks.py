"""Data loading and evaluation of detectors, of their LazyConfigs, and of classifiers."""

import inspect
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from detectron2.config import instantiate
from detectron2.data import (
    build_detection_test_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data.transforms import FixedSizeCrop
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.registry import locate

from ..config.options import RunOptions
from ..data.classification import (
    build_classification_test_loader,
    build_classification_train_loader,
    build_mapper,
    check_sampler,
)
from ..data.coco import check_registered
from ..data.image_folder import check_image_folders
from ..data.loader import TrainLoader, build_train_loader, end_workers_with_parent
from ..data.mapper import DetectionMapper, build_test_mapper, build_train_mapper
from ..errors import UsageError
from ..evaluation.accuracy import ClassificationEvaluator
from ..evaluation.by_type import EVALUATOR_TYPES, evaluator_by_type
from ..evaluation.coco import coco_metrics


class Task(ABC):
    """Data loading and evaluation for the model of a config.

    Attributes:
        evaluator_types: what the ``evaluator_type`` of its data sets may be.
    """

    evaluator_types: Sequence[str]

    def __init__(self, options: RunOptions):
        """
        Args:
            options: of the run.
        """
        self.options, self.cfg = options, options.config

    @property
    @abstractmethod
    def fixed_size(self) -> int:
        """The height and width that all images to train on have; 0 if they differ."""

    @abstractmethod
    def metrics(self, class_names: Sequence[str]) -> list[str]:
        """Name the metrics of an evaluation on a data set with these classes."""

    @abstractmethod
    def check_data(self, names: Sequence[str], training: bool) -> None:
        """Check the files of data sets to train or to test on."""

    @abstractmethod
    def check_mapper(self, is_train: bool) -> None:
        """Build the mapper of the data to train or to test on, to find mistakes in its options."""

    @abstractmethod
    def test_mapper(self) -> Any:
        """Build the mapper of the data to test on, which prediction uses as well."""

    @abstractmethod
    def train_loader(self) -> TrainLoader:
        """Build the loader of the data to train on."""

    @abstractmethod
    def test_loader(self, name: str) -> Iterable[Any]:
        """Build the loader of a data set to test on."""

    @abstractmethod
    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        """Build the evaluator of a data set, which writes its results into a folder."""

    @abstractmethod
    def validation_batches(self) -> Iterator[Any]:
        """Yield the batches of the data to test on with what the losses need."""

    def results_folder(self, name: str, *parts: str) -> str:
        """Return the folder of what evaluation writes about a data set."""
        # Data named on the command line is registered under its path.
        folder = re.sub(r"[^\w.-]+", "_", name.strip("/"))
        return os.path.join(self.options.output_dir, "inference", *parts, folder)


class Detection(Task):
    """Detectors of yaml configs, on data sets with boxes."""

    evaluator_types = EVALUATOR_TYPES

    @property
    def fixed_size(self) -> int:
        jitter = self.cfg.INPUT.JITTER
        return jitter.CROP_SIZE if jitter.ENABLED else 0

    def metrics(self, class_names: Sequence[str]) -> list[str]:
        options = self.options
        asked = {"bbox": True, "segm": options.mask_on, "keypoints": options.keypoint_on}
        tasks = [task for task in asked if asked[task]]
        return [f"{task}/{name}" for task in tasks for name in coco_metrics(task, class_names)]

    def check_data(self, names: Sequence[str], training: bool) -> None:
        check_registered(names, training=training, **self.options.image_options())

    def check_mapper(self, is_train: bool) -> None:
        build_train_mapper(self.cfg) if is_train else self.test_mapper()

    def test_mapper(self) -> Any:
        return build_test_mapper(self.cfg)

    def train_loader(self) -> TrainLoader:
        return build_train_loader(self.cfg)

    def test_loader(self, name: str) -> Iterable[Any]:
        mapper = self.test_mapper()
        return end_workers_with_parent(build_detection_test_loader(self.cfg, name, mapper=mapper))

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        return evaluator_by_type(
            name,
            folder,
            max_dets_per_image=self.cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=self.cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def validation_batches(self) -> Iterator[list[dict[str, Any]]]:
        # Test-time resizing with the annotations that detectron2's test mapper drops.
        augmentations = detection_utils.build_augmentation(self.cfg, is_train=False)
        mapper = DetectionMapper(self.cfg, is_train=True, augmentations=augmentations)
        for name in self.options.test:
            loader = build_detection_test_loader(
                get_detection_dataset_dicts([name], filter_empty=False),
                mapper=mapper,
                num_workers=self.options.num_workers,
            )
            yield from end_workers_with_parent(loader)


class LazyDetection(Detection):
    """Detectors of LazyConfigs, whose loaders, mappers and evaluators are made by calls."""

    @property
    def fixed_size(self) -> int:
        augmentations = getattr(self._train_mapper, "augmentations", None)
        for augmentation in getattr(augmentations, "augs", ()):
            if isinstance(augmentation, FixedSizeCrop):
                return max(augmentation.crop_size)
        return 0

    @cached_property
    def _train_mapper(self) -> Any:
        return self._mapper("train")

    def test_mapper(self) -> Any:
        return self._mapper("test")

    def _mapper(self, split: str) -> Any:
        mapper = instantiate(self.cfg.dataloader[split].mapper)
        if not callable(mapper):
            raise UsageError(
                f"dataloader.{split}.mapper must be the call that makes a mapper, got {mapper!r}."
            )
        return mapper

    def check_mapper(self, is_train: bool) -> None:
        loaders = self.cfg.dataloader
        if is_train:
            _ = self._train_mapper  # building it finds mistakes
            _check_call("dataloader.train", self._train_call())
            _check_call("dataloader.train.dataset", loaders.train.dataset)
            return
        self.test_mapper()
        for name in self.options.test[:1]:
            _check_call("dataloader.test", self._test_call(name))
            _check_call("dataloader.test.dataset", loaders.test.dataset)
            _check_call("dataloader.evaluator", self._evaluator_call(name, ""))

    def train_loader(self) -> TrainLoader:
        return instantiate(self._train_call())

    def test_loader(self, name: str) -> Iterable[Any]:
        return end_workers_with_parent(instantiate(self._test_call(name)))

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        return instantiate(self._evaluator_call(name, folder))

    def validation_batches(self) -> Iterator[list[dict[str, Any]]]:
        loaders = self.cfg.dataloader
        mapper = {
            **loaders.train.mapper,
            "augmentations": loaders.test.mapper.augmentations,
            "recompute_boxes": False,
        }
        for name in self.options.test:
            yield from instantiate({**self._test_call(name), "mapper": mapper})

    def _train_call(self) -> dict[str, Any]:
        return {
            **self.cfg.dataloader.train,
            "seed": max(self.options.seed, 0),
            "parts": self.options.accumulation_steps,
            "num_workers": self.options.num_workers,
            "pin_memory": self.options.device.startswith("cuda"),
        }

    def _test_call(self, name: str) -> dict[str, Any]:
        loader = self.cfg.dataloader.test
        return {**loader, "dataset": {**loader.dataset, "names": name}}

    def _evaluator_call(self, name: str, folder: str) -> dict[str, Any]:
        call = self.cfg.dataloader.evaluator
        return {**call, "dataset_name": name, "output_dir": folder}


def _check_call(name: str, call: Mapping[str, Any]) -> None:
    """Check the arguments of a call that reads data, without making it."""
    arguments = {key: value for key, value in call.items() if key != "_target_"}
    target = call["_target_"]
    try:
        inspect.signature(locate(target) if isinstance(target, str) else target).bind(**arguments)
    except TypeError as error:
        raise UsageError(f"{name}: {error}.") from error


class Classification(Task):
    """Image classifiers, on folders of images."""

    evaluator_types = ("classification",)

    @property
    def fixed_size(self) -> int:
        return self.cfg.INPUT.CLASSIFICATION.CROP_SIZE

    def metrics(self, class_names: Sequence[str]) -> list[str]:
        return ["classification/top1", "classification/top5"]

    def check_data(self, names: Sequence[str], training: bool) -> None:
        check_image_folders(names)

    def check_mapper(self, is_train: bool) -> None:
        if is_train:
            check_sampler(self.cfg)
        build_mapper(self.cfg, is_train=is_train)

    def test_mapper(self) -> Any:
        return build_mapper(self.cfg, is_train=False)

    def train_loader(self) -> TrainLoader:
        return build_classification_train_loader(self.cfg)

    def test_loader(self, name: str) -> Iterable[Any]:
        return build_classification_test_loader(self.cfg, name)

    def evaluator(self, name: str, folder: str) -> DatasetEvaluator:
        return ClassificationEvaluator(
            name,
            max_unreadable=self.options.max_unreadable,
            max_unreadable_fraction=self.options.max_unreadable_fraction,
        )

    def validation_batches(self) -> Iterator[dict[str, Any]]:
        for name in self.options.test:
            yield from (batch for batch in self.test_loader(name) if len(batch["label"]))


def task_of(options: RunOptions) -> Task:
    """Return the task of a config."""
    if options.meta_architecture == "Classifier":
        return Classification(options)
    return (LazyDetection if options.is_lazy else Detection)(options)
