"""RetinaNet on patchwise SAN10, with the recipe of the RetinaNets on ResNets."""

from .retinanet_SAN10_pairwise import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.bottom_up.attention = "patchwise"
train.output_dir = "./output/retinanet_SAN10_patchwise"
