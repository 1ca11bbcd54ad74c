"""The learning rate as a factor; warmup and steps are in iterations of the run."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

from sasa_det.engine.schedule import warmup_scheduler

# Appendix A.3: 150 epochs with one epoch of warmup, which is 1832 iterations of 64 images, for the
# 117,266 COCO images that have boxes.
lr_multiplier_150ep = L(warmup_scheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    max_iter="${train.max_iter}",
    warmup_iters=1832,
    warmup_epochs=1.0,
    warmup_factor=0.0,
    warmup_method="linear",
)

# detectron2's 3x schedule: 270,000 iterations of 16 images.
lr_multiplier_3x = L(warmup_scheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[0.1**k for k in range(3)],
        milestones=[210000, 250000],
        num_updates="${train.max_iter}",
    ),
    max_iter="${train.max_iter}",
    warmup_iters=1000,
    warmup_epochs=0.0,
    warmup_factor=0.001,
    warmup_method="linear",
)
