"""Data sets and the mapping of their images to the model's input."""

from .coco import check_coco, check_registered, num_classes_of, register_coco
from .digits import DIGIT_NAMES, register_digits, split_digits, write_digits
from .errors import DatasetError, ImageError
from .mapper import (
    DetectionMapper,
    build_test_mapper,
    build_train_mapper,
    jitter_and_crop_augmentations,
)
from .reading import UnreadableImages
from .validation import CocoReport, validate_coco

__all__ = [
    "DIGIT_NAMES",
    "CocoReport",
    "DatasetError",
    "DetectionMapper",
    "ImageError",
    "UnreadableImages",
    "build_test_mapper",
    "build_train_mapper",
    "check_coco",
    "check_registered",
    "jitter_and_crop_augmentations",
    "num_classes_of",
    "register_coco",
    "register_digits",
    "split_digits",
    "validate_coco",
    "write_digits",
]
