"""Table 2, row 5: attention everywhere, with the recipe of appendix A.3."""

from ..Common.coco_schedule import lr_multiplier_150ep as lr_multiplier
from ..Common.data.coco_jitter import dataloader
from ..Common.models.retinanet_SASA import model
from ..Common.optim import SGD as optimizer
from ..Common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.total_batch_size = 64
optimizer.lr = 0.12
train.reference_batch = 64  # other batch sizes get another learning rate
# Lengths in epochs, and in iterations of the 117,266 COCO images that have boxes.
train.max_epochs, train.max_iter = 150.0, 274842
train.checkpoint_epochs, train.checkpointer.period = 5.0, 9161
train.eval_epochs, train.eval_period = 10.0, 18323
train.output_dir = "./output/retinanet_SASA_R_50_full"
