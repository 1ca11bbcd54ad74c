"""Table 2, row 4: attention everywhere except in the stem."""

from .retinanet_SASA_R_50_full import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.bottom_up.stem = "convolution"
train.output_dir = "./output/retinanet_SASA_R_50_convstem_full"
