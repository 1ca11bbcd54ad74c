from .attention_fpn import (
    AttentionFPN,
    LastLevelP6P7Attention,
    build_retinanet_sasa_resnet_fpn_backbone,
    build_sasa_resnet_fpn_backbone,
)
from .other_projects import build_other_backbone_with_sasa_resnet
from .san import (
    SAN,
    build_retinanet_san_fpn_backbone,
    build_san_backbone,
    build_san_fpn_backbone,
)
from .sasa_resnet import AttentionBottleneckBlock, SASAResNet, build_sasa_resnet_backbone

__all__ = [
    "AttentionBottleneckBlock",
    "AttentionFPN",
    "LastLevelP6P7Attention",
    "SAN",
    "SASAResNet",
    "build_other_backbone_with_sasa_resnet",
    "build_retinanet_san_fpn_backbone",
    "build_retinanet_sasa_resnet_fpn_backbone",
    "build_san_backbone",
    "build_san_fpn_backbone",
    "build_sasa_resnet_backbone",
    "build_sasa_resnet_fpn_backbone",
]
