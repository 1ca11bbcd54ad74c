"""ResNets whose spatial convolutions are local self-attention."""

import itertools
from collections.abc import Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import Tensor, nn

from ...config.defaults import check_has_keys
from ...config.recipe import recipe_keys
from ...layers import AttentionStem, LocalSelfAttention2d
from ...ops.local_attention import check_choice
from ..attention_options import PRIMITIVES, attention_options, check_norm
from ..fused import bottleneck
from ..pointwise import use_products
from .training_warnings import WarnsInTraining

STAGES = ("res2", "res3", "res4", "res5")
# Section 4.1: 38 and 26 layers remove one and two blocks from every stage of 50.
NUM_BLOCKS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# The only values of keys of detectron2's ResNet for what stages here have not: grouped, dilated and
# deformable convolutions.
_RESNETS_ONLY = {
    "NUM_GROUPS": 1,
    "RES5_DILATION": 1,
    "DEFORM_ON_PER_STAGE": [False] * 4,
    "DEFORM_MODULATED": False,
    "DEFORM_NUM_GROUPS": 1,
}


def _pointwise(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size=1,
        stride=stride,
        bias=False,
        norm=get_norm(norm, out_channels),
    )


class AttentionBottleneckBlock(CNNBlockBase):
    """Bottleneck block of :paper:`ResNet` with attention in place of its 3x3 convolution.

    Section 3.1 of "Stand-Alone Self-Attention in Vision Models".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm: str = "BN",
        attention: dict[str, Any] | None = None,
    ):
        """
        Args:
            in_channels, out_channels: channels of the block's input and output.
            bottleneck_channels: channels of the attention layer.
            stride: 1 or 2; attention runs before the 2x2 average pool of a stride of 2.
            norm: see :func:`detectron2.layers.get_norm`.
            attention: keywords of :class:`LocalSelfAttention2d`.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = _pointwise(in_channels, out_channels, norm, stride)
            weight_init.c2_msra_fill(self.shortcut)
        self.conv1 = _pointwise(in_channels, bottleneck_channels, norm)
        self.attention = LocalSelfAttention2d(
            bottleneck_channels, bottleneck_channels, stride=stride, **(attention or {})
        )
        self.norm = get_norm(norm, bottleneck_channels) or nn.Identity()
        self.conv3 = _pointwise(bottleneck_channels, out_channels, norm)
        weight_init.c2_msra_fill(self.conv1)
        weight_init.c2_msra_fill(self.conv3)
        use_products(self)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        if not torch.jit.is_scripting():
            fused = bottleneck(x, self)
            if fused is not None:
                return fused
        out = F.relu_(self.conv1(x))
        out = F.relu(self.norm(self.attention(out)))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class _Stem(AttentionStem):
    """The attention stem with what detectron2's ResNet asks of a stem."""

    freeze = CNNBlockBase.freeze


class SASAResNet(WarnsInTraining, ResNet):
    """Attention ResNet of "Stand-Alone Self-Attention in Vision Models", Section 3.

    Stem and stages are attentional or convolutional in any combination; convolutional stages
    carry their stride on the 3x3 convolution (ResNet v1.5), as the paper's baseline does.
    """

    @configurable
    def __init__(
        self,
        *,
        depth: int = 50,
        stem: str = "attention",
        attention_stages: Sequence[str] = STAGES,
        attention: dict[str, Any] | None = None,
        stem_options: dict[str, Any] | None = None,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        bottleneck_channels: int = 64,
        res2_out_channels: int = 256,
        width_multiplier: float = 1.0,
        norm: str = "BN",
        residual_init: float = 1.0,
        num_classes: int | None = None,
        out_features: list[str] | None = None,
        freeze_at: int = 0,
    ):
        """
        Args:
            depth: 26, 38, 50, 101 or 152.
            stem: "attention" or "convolution".
            attention_stages: the stages, of res2 to res5, whose 3x3 convolutions are attention.
            attention: keywords of :class:`LocalSelfAttention2d` for all stages.
            stem_options: keywords of :class:`AttentionStem`.
            in_channels: channels of the image.
            stem_out_channels, bottleneck_channels, res2_out_channels: channels of the stem, of
                res2's attention layers and of res2; later stages double the latter two.
            width_multiplier: factor on all three.
            norm: see :func:`detectron2.layers.get_norm`.
            residual_init: scale that residual branches start with, of the weight of their last
                norm or, without norms, of their last convolution; with 0 every block is its
                shortcut to begin with.
            num_classes: if given, a classifier "linear" follows res5.
            out_features: names of the features to return, of stem, res2 to res5 and linear; the
                last one if None.
            freeze_at: number of stages to freeze, see :meth:`ResNet.freeze`.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        check_choice("depth (MODEL.RESNETS.DEPTH)", depth, NUM_BLOCKS)
        check_choice("stem (MODEL.SASA.STEM)", stem, PRIMITIVES)
        check_norm("norm (MODEL.RESNETS.NORM)", norm)
        if not residual_init >= 0:
            raise ValueError(
                f"residual_init (MODEL.SASA.RESIDUAL_INIT) must be at least 0, got {residual_init}."
            )
        for name in attention_stages:
            check_choice("a stage of attention_stages (MODEL.SASA.ATTENTION_STAGES)", name, STAGES)
        features = ("stem", *STAGES) + (() if num_classes is None else ("linear",))
        for name in out_features or ():
            check_choice("a feature of out_features (MODEL.RESNETS.OUT_FEATURES)", name, features)
        stem_channels, width, out_channels = (
            _scaled(channels, width_multiplier)
            for channels in (stem_out_channels, bottleneck_channels, res2_out_channels)
        )
        if stem == "attention":
            stem_module = _Stem(
                in_channels,
                stem_channels,
                norm=lambda channels: get_norm(norm, channels) or nn.Identity(),
                **(stem_options or {}),
            )
        else:
            stem_module = BasicStem(in_channels, stem_channels, norm)
        stages = []
        in_channels = stem_channels
        for i, (name, num_blocks) in enumerate(zip(STAGES, NUM_BLOCKS[depth], strict=True)):
            options: dict[str, Any] = (
                {"block_class": AttentionBottleneckBlock, "attention": attention}
                if name in attention_stages
                else {"block_class": BottleneckBlock, "stride_in_1x1": False}
            )
            stages.append(
                ResNet.make_stage(
                    num_blocks=num_blocks,
                    stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
                    in_channels=in_channels,
                    out_channels=out_channels,
                    bottleneck_channels=width,
                    norm=norm,
                    **options,
                )
            )
            in_channels, out_channels, width = out_channels, 2 * out_channels, 2 * width
        if out_features is not None and "linear" in out_features and "res5" not in out_features:
            # detectron2 builds the stages that are asked for and no more.
            if len(out_features) > 1:
                raise ValueError(
                    "out_features (MODEL.RESNETS.OUT_FEATURES) must hold res5 if it holds linear "
                    f"and others, got {out_features}."
                )
            out_features = None
        with torch.no_grad():
            for block in itertools.chain.from_iterable(stages):
                (block.conv3.norm if norm else block.conv3).weight.mul_(residual_init)
        super().__init__(
            stem_module,
            stages,
            num_classes=num_classes,
            out_features=out_features,
            freeze_at=freeze_at,
        )
        use_products(self)
        if num_classes is not None:
            # detectron2 knows the shapes of the other features alone.
            self._out_feature_channels["linear"] = num_classes
            self._out_feature_strides["linear"] = None

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        check_has_keys(cfg)
        sasa, resnets = cfg.MODEL.SASA, cfg.MODEL.RESNETS
        for key, allowed in _RESNETS_ONLY.items():
            if resnets[key] != allowed:
                raise ValueError(
                    f"MODEL.RESNETS.{key} must be {allowed} for a SASA ResNet, got {resnets[key]}."
                )
        # True is detectron2's default, and says nothing of attention, whose stride is a pool.
        convolutional = sorted(set(STAGES) - set(sasa.ATTENTION_STAGES))
        if resnets.STRIDE_IN_1X1 and convolutional:
            raise ValueError(
                "MODEL.RESNETS.STRIDE_IN_1X1 must be False for a SASA ResNet with convolutional "
                f"stages ({', '.join(convolutional)}), whose strides are in 3x3 convolutions, got "
                "True."
            )
        return {
            "depth": resnets.DEPTH,
            "stem": sasa.STEM,
            "attention_stages": sasa.ATTENTION_STAGES,
            "attention": attention_options(cfg),
            "stem_options": {
                "num_heads": sasa.STEM_HEADS,
                "num_mixtures": sasa.STEM_MIXTURES,
                "values": sasa.STEM_VALUES,
                "relative": sasa.STEM_RELATIVE,
                "backend": sasa.BACKEND or None,
            },
            "in_channels": input_shape.channels,
            "stem_out_channels": resnets.STEM_OUT_CHANNELS,
            "bottleneck_channels": resnets.WIDTH_PER_GROUP,
            "res2_out_channels": resnets.RES2_OUT_CHANNELS,
            "width_multiplier": sasa.WIDTH_MULTIPLIER,
            "norm": resnets.NORM,
            "residual_init": sasa.RESIDUAL_INIT,
            "num_classes": (
                cfg.MODEL.CLASSIFIER.NUM_CLASSES if "linear" in resnets.OUT_FEATURES else None
            ),
            "out_features": resnets.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }


def _scaled(channels: int, factor: float) -> int:
    scaled = channels * factor
    if scaled < 1 or scaled != int(scaled):
        raise ValueError(
            f"width_multiplier (MODEL.SASA.WIDTH_MULTIPLIER) must scale {channels} channels to a "
            f"positive integer, got {factor}."
        )
    return int(scaled)


@BACKBONE_REGISTRY.register()
def build_sasa_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SASAResNet:
    """Build a :class:`SASAResNet` from ``MODEL.SASA`` and ``MODEL.RESNETS``.

    Its features stem and res2 to res5 have strides 4, 4, 8, 16 and 32.
    """
    backbone = SASAResNet(cfg, input_shape)
    backbone.recipe_keys = tuple(recipe_keys(cfg))
    return backbone
