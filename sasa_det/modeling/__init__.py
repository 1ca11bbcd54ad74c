"""Models; importing this package registers them with detectron2."""

from .backbone import AttentionFPN, SASAResNet
from .retinanet import AttentionRetinaNet, AttentionRetinaNetHead

__all__ = ["AttentionFPN", "AttentionRetinaNet", "AttentionRetinaNetHead", "SASAResNet"]
