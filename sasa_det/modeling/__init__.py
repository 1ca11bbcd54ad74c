"""Models; importing this package registers them with detectron2."""

from .backbone import SAN, AttentionFPN, SASAResNet
from .classifier import Classifier
from .fuse import fuse
from .pointwise import use_products
from .retinanet import AttentionRetinaNet, AttentionRetinaNetHead

__all__ = [
    "AttentionFPN",
    "AttentionRetinaNet",
    "AttentionRetinaNetHead",
    "Classifier",
    "SAN",
    "SASAResNet",
    "fuse",
    "use_products",
]
