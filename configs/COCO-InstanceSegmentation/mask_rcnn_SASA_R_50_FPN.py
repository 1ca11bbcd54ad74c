"""detectron2's own Mask R-CNN with an attention backbone; its FPN and heads are convolutional."""

from ..Common.coco_schedule import lr_multiplier_3x as lr_multiplier
from ..Common.data.coco import dataloader
from ..Common.models.mask_rcnn import model
from ..Common.optim import SGD as optimizer
from ..Common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.max_iter = 270000
train.output_dir = "./output/mask_rcnn_SASA_R_50_FPN"
