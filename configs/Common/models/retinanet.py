"""RetinaNet on the attention ResNet, with convolutional FPN and heads."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from sasa_det.modeling import AttentionRetinaNet

from .sasa_resnet import bottom_up

model = L(AttentionRetinaNet)(
    backbone=L(FPN)(
        bottom_up=bottom_up,
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        norm="SyncBN",
        top_block=L(LastLevelP6P7)(
            in_channels="${..out_channels}",
            out_channels="${..out_channels}",
            in_feature="p5",
        ),
        fuse_type="sum",
    ),
    head=L(RetinaNetHead)(
        # The shape of each level.
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}")] * 5,
        num_classes="${..num_classes}",
        num_anchors=9,
        conv_dims=["${...backbone.out_channels}"] * 4,
        # Without a norm, W_V from N(0, 0.01) leaves almost nothing of the features after four
        # attention layers.
        norm="SyncBN",
        prior_prob=0.01,
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    anchor_generator=L(DefaultAnchorGenerator)(
        # 2^0, 2^(1/3) and 2^(2/3) times 4 times the stride of the level, as in the RetinaNet paper
        sizes=[
            [32.0, 40.3175, 50.7968],
            [64.0, 80.6349, 101.5937],
            [128.0, 161.2699, 203.1873],
            [256.0, 322.5398, 406.3747],
            [512.0, 645.0796, 812.7493],
        ],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    smooth_l1_beta=0.0,
    test_score_thresh=0.05,
    test_topk_candidates=1000,
    test_nms_thresh=0.5,
    max_detections_per_image=100,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
