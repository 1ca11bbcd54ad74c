"""Data sets and the mapping of their images to the model's input."""

from .coco import (
    CocoSummary,
    DatasetError,
    check_coco,
    check_registered,
    num_classes_of,
    register_coco,
)
from .digits import DIGIT_NAMES, register_digits, split_digits, write_digits
from .mapper import JitterCropMapper, build_jitter_crop_mapper, jitter_and_crop_augmentations

__all__ = [
    "DIGIT_NAMES",
    "CocoSummary",
    "DatasetError",
    "JitterCropMapper",
    "build_jitter_crop_mapper",
    "check_coco",
    "check_registered",
    "jitter_and_crop_augmentations",
    "num_classes_of",
    "register_coco",
    "register_digits",
    "split_digits",
    "write_digits",
]
