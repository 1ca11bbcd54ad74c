"""Feature pyramids whose 3x3 convolutions are local self-attention."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ...layers import LocalSelfAttention2d
from ...layers.local_attention import RECTIFIED_MEAN
from ...ops.arguments import check_choice
from ..attention_options import PRIMITIVES, attention_options, check_norm
from ..pointwise import use_products
from .sasa_resnet import build_sasa_resnet_backbone


class AttentionFPN(FPN):
    """:paper:`FPN` with attention in place of its 3x3 output convolutions.

    Appendix A.3 of "Stand-Alone Self-Attention in Vision Models". Lateral layers stay pointwise.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        attention: dict[str, Any] | None = None,
    ):
        """
        Args:
            bottom_up, in_features, out_channels, norm, top_block, fuse_type: see
                :class:`detectron2.modeling.FPN`.
            attention: keywords of :class:`LocalSelfAttention2d`.
        """
        super().__init__(bottom_up, in_features, out_channels, norm, top_block, fuse_type)
        names = [name for name, _ in self.named_children() if name.startswith("fpn_output")]
        for name in names:
            layer = nn.Sequential()
            layer.attention = LocalSelfAttention2d(out_channels, out_channels, **(attention or {}))
            if norm:
                layer.norm = get_norm(norm, out_channels)
            setattr(self, name, layer)
        # FPN keeps its output layers from low to high resolution.
        self.output_convs = [getattr(self, name) for name in reversed(names)]
        # The attention layers that follow expect inputs with the mean of rectified ones.
        for name, module in self.named_modules():
            if name.startswith("fpn_") and getattr(module, "bias", None) is not None:
                nn.init.constant_(module.bias, RECTIFIED_MEAN)
        use_products(self)


class LastLevelP6P7Attention(nn.Module):
    """RetinaNet's extra levels P6 and P7, each attention and a 2x2 average pool (appendix A.3)."""

    num_levels = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_feature: str = "p5",
        attention: dict[str, Any] | None = None,
    ):
        """
        Args:
            in_channels: channels of ``in_feature``.
            out_channels: channels of P6 and P7.
            in_feature: name of the feature that P6 is made from.
            attention: keywords of :class:`LocalSelfAttention2d`.
        """
        super().__init__()
        self.in_feature = in_feature
        self.p6 = LocalSelfAttention2d(in_channels, out_channels, stride=2, **(attention or {}))
        self.p7 = LocalSelfAttention2d(out_channels, out_channels, stride=2, **(attention or {}))

    def forward(self, x: Tensor) -> list[Tensor]:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            list[Tensor]: P6 and P7 of half and a quarter of the size, rounded up.
        """
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))]


def build_fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """Put the FPN that ``MODEL.SASA.FPN`` asks for, attentional or detectron2's, on a backbone.

    ``top_block`` makes the levels above p5.
    """
    check_choice("MODEL.SASA.FPN", cfg.MODEL.SASA.FPN, PRIMITIVES)
    check_norm("MODEL.FPN.NORM", cfg.MODEL.FPN.NORM)
    for name in cfg.MODEL.FPN.IN_FEATURES:
        check_choice("a feature of MODEL.FPN.IN_FEATURES", name, bottom_up.output_shape())
    options = {
        "bottom_up": bottom_up,
        "in_features": cfg.MODEL.FPN.IN_FEATURES,
        "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "norm": cfg.MODEL.FPN.NORM,
        "top_block": top_block,
        "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
    }
    if cfg.MODEL.SASA.FPN == "attention":
        return AttentionFPN(**options, attention=attention_options(cfg))
    return FPN(**options)


def build_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Put an FPN with RetinaNet's levels P6 and P7 on a backbone."""
    in_feature = cfg.MODEL.SASA.TOP_BLOCK_IN_FEATURE
    check_choice("MODEL.SASA.TOP_BLOCK_IN_FEATURE", in_feature, ("p5", "res5"))
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    in_channels = out_channels if in_feature == "p5" else bottom_up.output_shape()["res5"].channels
    if cfg.MODEL.SASA.FPN == "attention":
        top_block = LastLevelP6P7Attention(
            in_channels, out_channels, in_feature, attention_options(cfg)
        )
    else:
        top_block = LastLevelP6P7(in_channels, out_channels, in_feature)
    return build_fpn(cfg, bottom_up, top_block)


@BACKBONE_REGISTRY.register()
def build_sasa_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an attention ResNet with an FPN for R-CNN: p2 to p5, and p6 by max pooling."""
    return build_fpn(cfg, build_sasa_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_sasa_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an attention ResNet with an FPN for RetinaNet: p3 to p7."""
    return build_retinanet_fpn(cfg, build_sasa_resnet_backbone(cfg, input_shape))
