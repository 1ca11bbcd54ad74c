"""Data sets and the mapping of their images to the model's input."""

from ..errors import DatasetError, ImageError
from .animals import fetch_animals, register_animals
from .catalog import num_classes_of
from .classification import (
    ClassificationMapper,
    build_classification_test_loader,
    build_classification_train_loader,
)
from .coco import check_coco, check_registered, register_coco
from .digit_drawing import DIGIT_NAMES, split_digits
from .digits import register_digit_crops, register_digits, write_digit_crops, write_digits
from .image_folder import check_image_folders, hold_out, register_image_folder
from .images import UnreadableImages
from .loader import build_train_loader
from .mapper import (
    DetectionMapper,
    build_test_mapper,
    build_train_mapper,
    jitter_and_crop_augmentations,
)
from .sources import open_data
from .validation import CocoReport, validate_coco

__all__ = [
    "DIGIT_NAMES",
    "ClassificationMapper",
    "CocoReport",
    "DatasetError",
    "DetectionMapper",
    "ImageError",
    "UnreadableImages",
    "build_classification_test_loader",
    "build_classification_train_loader",
    "build_test_mapper",
    "build_train_loader",
    "build_train_mapper",
    "check_coco",
    "check_image_folders",
    "check_registered",
    "fetch_animals",
    "hold_out",
    "jitter_and_crop_augmentations",
    "num_classes_of",
    "open_data",
    "register_animals",
    "register_coco",
    "register_digit_crops",
    "register_digits",
    "register_image_folder",
    "split_digits",
    "validate_coco",
    "write_digit_crops",
    "write_digits",
]
