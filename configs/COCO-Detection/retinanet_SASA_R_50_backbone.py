"""Table 2, row 3: fully attentional backbone; convolutional FPN and heads."""

from ..Common.models.retinanet import model
from .retinanet_SASA_R_50_full import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.output_dir = "./output/retinanet_SASA_R_50_backbone"
