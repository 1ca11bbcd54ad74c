"""A trained detector, from a checkpoint and the config and class names that it carries."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.checkpointer import read_weights
from ..checkpoint.preprocessing import warn_of_preprocessing
from ..checkpoint.reading import category_ids_in, classes_in, config_in
from ..config.load import BUILD_ERRORS, explain_build_error
from ..config.options import RunOptions
from ..config.stored import options_without_data, stored_options
from ..data.catalog import category_ids
from ..errors import UsageError
from ..export import is_exported, read_exported
from ..modeling.rcnn import check_res5_heads
from ..modeling.test_time_augmentation import check_augmentation
from ..utils.machine import default_device
from .checks import check_device

logger = logging.getLogger(__name__)

# Models that find no instances, by what they do.
_NO_DETECTORS = {
    "Classifier": "classifies whole images",
    "SemanticSegmentor": "segments images into classes",
    "ProposalNetwork": "proposes boxes without classes",
}

# Keys of an exported model's config that its use reads, by how they begin.
_CHANGEABLE = ("INPUT.", "TEST.AUG.", "dataloader.")


@dataclass(frozen=True)
class TrainedModel:
    """A detector with its weights, in eval mode.

    Attributes:
        model: on the device of the options.
        options: of its config.
        class_names: in the order of the class indices; empty if they are not known.
        category_ids: of the classes in the data that it was trained on, in the same order; empty
            if they are not known.
    """

    model: nn.Module
    options: RunOptions
    class_names: list[str]
    category_ids: list[int]

    @property
    def config(self) -> CfgNode | DictConfig:
        return self.options.config

    @property
    def num_classes(self) -> int | None:
        """The number of classes, if the config has it where it is known to be."""
        return _num_classes(self.options)

    def class_name(self, index: int) -> str:
        """Return the name of a class, which is as "class 3" if the names are not known."""
        known = index < len(self.class_names)
        return self.class_names[index] if known else f"class {index}"

    def category_id(self, index: int) -> int:
        """Return the id of a class in COCO's files, which is its index if the ids are not known."""
        return self.category_ids[index] if index < len(self.category_ids) else index


def load_trained_model(
    weights: str | os.PathLike,
    *,
    config_file: str = "",
    opts: Sequence[str] = (),
    classifiers: bool = False,
) -> TrainedModel:
    """Build the detector of a checkpoint and load its weights.

    It runs on a GPU if there is one and ``MODEL.DEVICE`` is not among ``opts``. Names and ids of
    classes are those that the checkpoint holds, as all do that a training here saves, or else of
    the data set that its config names in ``DATASETS.TRAIN``, if that is registered.

    Args:
        weights: a checkpoint of this project or of detectron2, a file of ``sasa-det export``,
            which runs on the CPU, or the name of a config whose weights the model zoo has, such as
            "Digits/retinanet_SASA.yaml".
        config_file: yaml config or LazyConfig of the model, in place of the one in the checkpoint.
        opts: KEY VALUE pairs that override it, or key=value for a LazyConfig.
        classifiers: whether the model may be a classifier.

    Raises:
        UsageError: if there is no config, it cannot be used, or is not a detector's.
        CheckpointError: if the weights cannot be used, or do not fit the model.
    """
    if not os.fspath(weights):
        raise UsageError("no weights are given: name a checkpoint, such as model_final.pth.")
    if is_exported(weights):
        return _load_exported(weights, config_file, opts)
    checkpoint, path = read_weights(weights)
    text = config_in(checkpoint)
    if config_file:
        options = options_without_data(config_file, opts)
    elif text:
        options = stored_options(text, f"the config in {path}", opts)
    else:
        raise UsageError(
            f"{path} holds no config, as the checkpoints of a training here do: give the config "
            "of its model with --config-file."
        )
    options = _on_device(options, opts)
    names = classes_in(checkpoint)
    key = options.class_key
    if config_file and names and key and not any(word.startswith(key) for word in opts):
        options = options.replace(num_classes=len(names))
    if not (classifiers and options.meta_architecture == "Classifier"):
        _check_kind(options, path)
    try:
        # Not MODEL.COMPILE and the like: they take longer than they gain over some images.
        if options.is_lazy:
            model = instantiate(options.config.model).to(options.device)
        else:
            check_augmentation(options.config)
            model = build_model(options.config)
        check_res5_heads(model)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
    warn_of_preprocessing(options.config, checkpoint)
    ids = category_ids_in(checkpoint)
    Checkpointer(model, strict=True).load_read(checkpoint, path)
    known = _of_training_data(options)
    if names is None:
        names = known.names
    if ids is None and names == known.names:
        ids = known.ids
    return TrainedModel(model.eval(), options, names, ids or [])


def _load_exported(path: str | os.PathLike, config_file: str, opts: Sequence[str]) -> TrainedModel:
    if config_file:
        raise UsageError(f"{path} holds its config; leave --config-file out.")
    model = read_exported(path)
    options = stored_options(model.facts["config"], f"the config in {path}", opts)
    _check_overrides(path, opts, options.is_lazy)
    options = options.replace(device="cpu")
    _check_kind(options, path)
    if options.tta_enabled:
        raise UsageError(
            f"{path}: TEST.AUG.ENABLED must be False, for an exported model has no test-time "
            "augmentation."
        )
    return TrainedModel(model, options, model.facts["classes"], model.facts["category_ids"])


def _check_overrides(path: str | os.PathLike, opts: Sequence[str], is_lazy: bool) -> None:
    """Refuse the overrides of a config that would do nothing, as the exported model is made."""
    words = [word for word in opts if word != "--"]
    if is_lazy:
        pairs = [(key.lstrip("+~"), value) for key, _, value in (w.partition("=") for w in words)]
    else:
        pairs = zip(words[::2], words[1::2], strict=False)
    for key, value in pairs:
        if not key.startswith(_CHANGEABLE) and (key, value) != ("MODEL.DEVICE", "cpu"):
            raise UsageError(
                f"{key} is part of the exported file {path} and cannot be changed, as only keys of "
                "INPUT (dataloader in a LazyConfig) can: export the checkpoint again with it."
            )


def _on_device(options: RunOptions, opts: Sequence[str]) -> RunOptions:
    key = options.key("device")
    if not any(word.split("=")[0] == key for word in opts):
        # Where it was trained is not where it is used.
        options = options.replace(device=default_device())
    check_device(options)
    return options


def _check_kind(options: RunOptions, path: os.PathLike) -> None:
    kind = options.meta_architecture
    if kind in _NO_DETECTORS:
        raise UsageError(
            f"{path} is a {kind}, which {_NO_DETECTORS[kind]} and finds no objects: prediction "
            "needs a detector."
        )
    if options.load_proposals:
        key = options.key("load_proposals")
        raise UsageError(f"{path}: {key} must be False, because new images have no proposals.")


def _num_classes(options: RunOptions) -> int | None:
    return options.num_classes if options.class_key else None


class _Classes(NamedTuple):
    names: list[str]
    ids: list[int]


def _of_training_data(options: RunOptions) -> _Classes:
    """Return names and ids of the classes of the data set in a config, if it is registered."""
    for name in options.train[:1]:
        if name not in DatasetCatalog:
            break
        names = list(MetadataCatalog.get(name).get("thing_classes") or ())
        if _num_classes(options) in (None, len(names)):
            return _Classes(names, category_ids(name))
    return _Classes([], [])
