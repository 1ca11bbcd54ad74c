"""RetinaNet on pairwise SAN10, with the recipe of the RetinaNets on ResNets."""

from ..Common.models.retinanet_SAN import model
from .retinanet_R_50 import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.output_dir = "./output/retinanet_SAN10_pairwise"
