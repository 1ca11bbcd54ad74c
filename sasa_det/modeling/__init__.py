"""Models; importing this package registers them with detectron2."""

from .backbone import SAN, AttentionFPN, SASAResNet
from .classifier import Classifier
from .fuse import fuse
from .pointwise import use_products
from .retinanet import AttentionRetinaNet, AttentionRetinaNetHead
from .test_time_augmentation import RetinaNetWithTTA, with_augmentation

__all__ = [
    "AttentionFPN",
    "AttentionRetinaNet",
    "AttentionRetinaNetHead",
    "Classifier",
    "RetinaNetWithTTA",
    "SAN",
    "SASAResNet",
    "fuse",
    "use_products",
    "with_augmentation",
]
