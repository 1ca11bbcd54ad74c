"""Table 2, row 2: attention backbone with convolution stem; convolutional FPN and heads."""

from .retinanet_SASA_R_50_backbone import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.bottom_up.stem = "convolution"
train.output_dir = "./output/retinanet_SASA_R_50_convstem_backbone"
