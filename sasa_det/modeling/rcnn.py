"""What detectron2's R-CNN heads demand of a backbone."""

from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn


def check_res5_heads(model: nn.Module) -> None:
    """Check that heads which bring the backbone's last stage take the channels that it gives.

    Args:
        model: of any kind; only one with detectron2's ``Res5ROIHeads`` can be wrong.

    Raises:
        ValueError: in one sentence that says what must be set.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, Res5ROIHeads):
        return
    (feature,) = heads.in_features
    given = model.backbone.output_shape()[feature].channels
    taken = heads.res5[0].in_channels
    if given != taken:
        raise ValueError(
            f"the backbone gives {given} channels as {feature} and MODEL.ROI_HEADS.NAME "
            f"Res5ROIHeads takes {taken}, 4 times MODEL.RESNETS.RES2_OUT_CHANNELS: with it, set "
            "MODEL.SASA.WIDTH_MULTIPLIER 1.0 and give the width as "
            "MODEL.RESNETS.STEM_OUT_CHANNELS, WIDTH_PER_GROUP and RES2_OUT_CHANNELS."
        )
