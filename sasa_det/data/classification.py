"""Images to classify: cropped, batched and loaded for training and testing."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MapDataset
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import ConcatDataset, DataLoader, default_collate
from torchvision.transforms import v2

from ..errors import ImageError
from .images import MAX_PIXELS, read_rgb
from .loader import TrainLoader, end_with_parent, loader_options

_FLIPS = {"horizontal": [v2.RandomHorizontalFlip()], "vertical": [v2.RandomVerticalFlip()]}
_FLIPS["none"] = []


class ClassificationMapper:
    """Maps a record to the model's input: a square crop and the number of its class.

    Training cuts out a part of random area, shape and place, scales it to the crop's size and
    flips it. Testing scales the shorter side and cuts out the centre. Random numbers come from
    torch's generator alone. As in torchvision's data sets, orientation by EXIF is not applied.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        crop_size: int = 224,
        min_area: float = 0.08,
        resize_test: int = 256,
        flip: str = "horizontal",
        image_format: str = "RGB",
        max_pixels: int = MAX_PIXELS,
    ):
        """
        Args:
            is_train: whether crops are random.
            crop_size: side of the crop in pixels.
            min_area: smallest part of the image's area that training cuts out, in (0, 1].
            resize_test: length of the shorter side in testing, at least ``crop_size``.
            flip: "horizontal", "vertical" or "none".
            image_format: "RGB" or "BGR"; a ValueError refuses others.
            max_pixels: images of more are refused.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.FORMAT must be RGB or BGR for image classification, got {image_format}"
            )
        if resize_test < crop_size:
            raise ValueError(
                "INPUT.CLASSIFICATION.RESIZE_TEST must be at least CROP_SIZE, which is "
                f"{crop_size}, got {resize_test}"
            )
        self.image_format, self.max_pixels = image_format, max_pixels
        if is_train:
            crop = [v2.RandomResizedCrop(crop_size, scale=(min_area, 1)), *_FLIPS[flip]]
        else:
            crop = [v2.Resize(resize_test), v2.CenterCrop(crop_size)]
        self.transform = v2.Compose([*crop, v2.PILToTensor()])
        # The shorter side that the whole image is scaled to.
        self.scaled_side = 0 if is_train else resize_test

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return "image", (3, S, S) uint8, beside a record's "label", "file_name" and "image_id".

        Raises:
            ImageError: if the image cannot be read, is too large, or would be when it is scaled.
        """
        path = record["file_name"]
        image = read_rgb(path, self.max_pixels)
        shorter, longer = sorted(image.size)
        if self.scaled_side**2 * longer > self.max_pixels * shorter:
            raise ImageError(
                f"image {path} has {image.width} x {image.height} pixels, which are more than the "
                f"{self.max_pixels:,} that max_pixels (INPUT.MAX_PIXELS) allows when its shorter "
                f"side is scaled to {self.scaled_side}",
                path,
            )
        pixels = self.transform(image)
        if self.image_format == "BGR":
            pixels = pixels.flip(0)
        return {"image": pixels} | {key: record[key] for key in ("label", "file_name", "image_id")}


def build_mapper(cfg: CfgNode, is_train: bool) -> ClassificationMapper:
    """Build the mapper of a config; a ValueError names a key whose value is out of range."""
    keys = cfg.INPUT.CLASSIFICATION
    return ClassificationMapper(
        is_train=is_train,
        crop_size=keys.CROP_SIZE,
        min_area=keys.MIN_AREA,
        resize_test=keys.RESIZE_TEST,
        flip=cfg.INPUT.RANDOM_FLIP,
        image_format=cfg.INPUT.FORMAT,
        max_pixels=cfg.INPUT.MAX_PIXELS,
    )


def collate_classification(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of at least one mapped record.

    Returns:
        dict: "image" (N, 3, S, S) uint8, "label" (N,) int64, "file_name" and "image_id" as lists.
    """
    return default_collate(list(samples))


def check_sampler(cfg: CfgNode) -> None:
    """Raise ValueError if the sampler of a config is one for detection."""
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN must be TrainingSampler for image classification, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN}"
        )


def build_classification_train_loader(cfg: CfgNode, seed: int | None = None) -> TrainLoader:
    """Build the loader of the data sets of ``DATASETS.TRAIN``, one after the other.

    Args:
        cfg, seed: as of :func:`sasa_det.data.build_train_loader`.

    Returns:
        TrainLoader: of batches as of :func:`collate_classification`.

    Raises:
        ValueError: if the sampler is one for detection or the batch cannot be split evenly.
        DatasetError, FileNotFoundError: if a data set cannot be read.
    """
    check_sampler(cfg)
    parts = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    records = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    return TrainLoader(
        records,
        build_mapper(cfg, is_train=True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=max(cfg.SEED, 0) if seed is None else seed,
        aspect_ratio_grouping=False,
        collate=collate_classification,
        **loader_options(cfg),
    )


def build_classification_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build a loader of this process' share of a data set's images, each of them once.

    Returns:
        DataLoader: of batches of up to ``TEST.IMS_PER_BATCH`` images, as of
        :func:`collate_classification`, with the ImageErrors of those that cannot be read and are
        not in the batch as "unreadable"; none may be left.

    Raises:
        DatasetError, FileNotFoundError: if the data set cannot be read.
    """
    records = DatasetCatalog.get(dataset_name)
    mapper = build_mapper(cfg, is_train=False)
    return DataLoader(
        MapDataset(records, partial(_map_or_tell, mapper)),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        sampler=InferenceSampler(len(records)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=end_with_parent,
        collate_fn=partial(_collate_readable, cfg.INPUT.CLASSIFICATION.CROP_SIZE),
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )


def _map_or_tell(
    mapper: Callable[[dict[str, Any]], dict[str, Any]], record: dict[str, Any]
) -> dict[str, Any] | ImageError:
    try:
        return mapper(record)
    except ImageError as error:
        return error


def _collate_readable(
    crop_size: int, samples: Sequence[dict[str, Any] | ImageError]
) -> dict[str, Any]:
    unreadable = [sample for sample in samples if isinstance(sample, ImageError)]
    if len(unreadable) < len(samples):
        batch = collate_classification([s for s in samples if not isinstance(s, ImageError)])
    else:
        images = torch.empty((0, 3, crop_size, crop_size), dtype=torch.uint8)
        labels = torch.empty(0, dtype=torch.int64)
        batch = {"image": images, "label": labels, "file_name": [], "image_id": []}
    return {**batch, "unreadable": unreadable}
