"""The learning rate as a factor that follows the fraction of the run that is done."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

# Appendix A.3: 150 epochs, the first of which warms up: 1832 iterations of 64 of COCO's 117,266
# images with boxes.
lr_multiplier_150ep = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.0,
    warmup_length=1832 / 274842,
    warmup_method="linear",
)

# detectron2's 3x schedule: 270,000 iterations of 16 images.
lr_multiplier_3x = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[0.1**k for k in range(3)], milestones=[210000, 250000], num_updates=270000
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 270000,
    warmup_method="linear",
)
