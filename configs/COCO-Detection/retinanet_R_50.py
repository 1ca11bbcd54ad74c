"""Table 2, row 1: the convolutional baseline."""

from .retinanet_SASA_R_50_convstem_backbone import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.bottom_up.attention_stages = []
train.output_dir = "./output/retinanet_R_50"
