"""R-CNN heads of detectron2 on our backbones."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from sasa_det import add_sasa_config
from sasa_det.modeling.rcnn import check_res5_heads


def c4(**options):
    """An R-CNN with res5 in its heads, as detectron2's R_50_C4."""
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.DEPTH = 26
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    for key, value in options.items():
        node, _, name = key.partition("_")
        cfg.MODEL[node][name] = value
    return build_model(cfg)


def test_another_width_is_refused_with_what_must_be_set():
    with pytest.raises(ValueError) as error:
        check_res5_heads(c4(SASA_WIDTH_MULTIPLIER=0.25))
    assert str(error.value) == (
        "the backbone gives 256 channels as res4 and MODEL.ROI_HEADS.NAME Res5ROIHeads takes 1024, "
        "4 times MODEL.RESNETS.RES2_OUT_CHANNELS: with it, set MODEL.SASA.WIDTH_MULTIPLIER 1.0 and "
        "give the width as MODEL.RESNETS.STEM_OUT_CHANNELS, WIDTH_PER_GROUP and RES2_OUT_CHANNELS."
    )


def test_what_the_sentence_says_trains():
    width = {"STEM_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 16, "RES2_OUT_CHANNELS": 64}
    model = c4(**{f"RESNETS_{key}": value for key, value in width.items()})
    check_res5_heads(model)
    objects = Instances((96, 96), gt_boxes=Boxes([[8.0, 8.0, 60.0, 60.0]]))
    objects.gt_classes = torch.tensor([3])
    batch = [{"image": torch.rand(3, 96, 96), "instances": objects}] * 2
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.roi_heads.res5.parameters())


def test_other_models_are_left_alone():
    check_res5_heads(torch.nn.Identity())
