"""Table 2, row 5: attention everywhere, with the recipe of appendix A.3."""

from ..common.coco_schedule import lr_multiplier_150ep as lr_multiplier
from ..common.data.coco_jitter import dataloader
from ..common.models.retinanet_SASA import model
from ..common.optim import SGD as optimizer
from ..common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.total_batch_size = 64
optimizer.lr = 0.12
train.max_iter = 274842  # 150 epochs
train.checkpointer.period = 9160  # 5 epochs
train.eval_period = 18320  # 10 epochs
train.output_dir = "./output/retinanet_SASA_R_50_full"
