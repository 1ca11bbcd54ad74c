"""RetinaNet with attentional towers and prediction layers."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config.defaults import check_has_keys
from ..layers import LocalSelfAttention2d
from ..ops.local_attention import check_choice
from .attention_options import PRIMITIVES, attention_options, check_norm
from .attention_tower import AttentionTower
from .focal_loss import focal_loss
from .joined_head import run_joined
from .level_norm import join_level_norms
from .pointwise import PointwiseConv2d, use_products


class AttentionRetinaNetHead(nn.Module):
    """RetinaNet's two subnets with attention in place of every 3x3 convolution.

    Appendix A.3 of "Stand-Alone Self-Attention in Vision Models": towers of attention layers,
    then an attention layer and the pointwise convolution that mixes its heads into the outputs.
    Weights are shared over the levels; batch norms keep statistics of their own for each level.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str = "",
        prior_prob: float = 0.01,
        mixing_layer: bool = False,
        attention: dict[str, Any] | None = None,
    ):
        """
        Args:
            input_shape: shapes of the levels; all have the same channels.
            num_classes: number of classes K.
            num_anchors: number of anchors A a location.
            conv_dims: channels of the tower's layers.
            norm: norm of the tower's layers, see :func:`detectron2.layers.get_norm`.
            prior_prob: probability of an object that the initial class bias expresses.
            mixing_layer: whether a pointwise layer of the tower's width stands before the
                pointwise layer that produces the outputs.
            attention: keywords of :class:`LocalSelfAttention2d`.
        """
        super().__init__()
        self._num_levels = len(input_shape)
        options = attention or {}
        channels = [input_shape[0].channels, *conv_dims]
        self.cls_subnet = self._make_tower(channels, norm, options)
        self.bbox_subnet = self._make_tower(channels, norm, options)
        self.cls_score = _prediction(channels[-1], num_anchors * num_classes, mixing_layer, options)
        self.bbox_pred = _prediction(channels[-1], num_anchors * 4, mixing_layer, options)
        for module in self.modules():
            if isinstance(module, LocalSelfAttention2d):
                nn.init.normal_(module.value.weight, std=0.01)
                for name in ("query_norm", "key_norm"):
                    norm = getattr(module, name)
                    if isinstance(norm, nn.BatchNorm2d):
                        setattr(module, name, _norm_of_levels(norm, self._num_levels))
        # The outputs start with `prior_prob` for every class.
        nn.init.constant_(self.cls_score[-1].bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        options = RetinaNetHead.from_config(cfg, input_shape)
        options["attention"] = attention_options(cfg)
        options["mixing_layer"] = cfg.MODEL.SASA.HEAD_MIXING_LAYER
        return options

    def _make_tower(
        self, channels: list[int], norm: str, options: dict[str, Any]
    ) -> AttentionTower:
        tower = AttentionTower()
        for in_channels, out_channels in zip(channels, channels[1:], strict=False):
            layer = nn.ModuleDict(
                {"attention": LocalSelfAttention2d(in_channels, out_channels, **options)}
            )
            if norm:
                per_level = norm in ("BN", "SyncBN")
                layer["norms"] = nn.ModuleList(
                    get_norm(norm, out_channels)
                    for _ in range(self._num_levels if per_level else 1)
                )
            tower.append(layer)
        return tower

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: one (N, C, H, W) for each level, from high to low resolution.

        Returns:
            (logits, deltas): lists of (N, A K, H, W) and (N, A 4, H, W), one for each level.
        """
        if not torch.jit.is_scripting():
            joined = run_joined(self, features)
            if joined is not None:
                return joined
        logits, deltas = [], []
        for level, feature in enumerate(features):
            logits.append(self.cls_score(self.cls_subnet(feature, level)))
            deltas.append(self.bbox_pred(self.bbox_subnet(feature, level)))
        return logits, deltas


def _norm_of_levels(norm: nn.BatchNorm2d, num_levels: int) -> CycleBatchNormList:
    """Return norms that share a norm's scale and shift, with statistics for each level."""
    levels = CycleBatchNormList(num_levels, num_features=norm.num_features)
    levels.weight, levels.bias = norm.weight, norm.bias
    return levels


def _prediction(
    channels: int, outputs: int, mixing_layer: bool, options: dict[str, Any]
) -> nn.Sequential:
    layers: list[nn.Module] = [LocalSelfAttention2d(channels, channels, **options)]
    if mixing_layer:
        layers.append(PointwiseConv2d(channels, channels, 1))
    layers.append(PointwiseConv2d(channels, outputs, 1))
    for layer in layers[1:]:
        # After W_V of 0.01, RetinaNet's 0.01 once more would leave no gradient to speak of.
        nn.init.normal_(layer.weight, std=channels**-0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@META_ARCH_REGISTRY.register()
class AttentionRetinaNet(RetinaNet):
    """:paper:`RetinaNet` with the head that ``MODEL.SASA.HEAD`` asks for.

    Section 4.2 of "Stand-Alone Self-Attention in Vision Models". Backbone and FPN follow
    ``MODEL.BACKBONE.NAME``, so that each part is attentional or convolutional on its own.
    """

    @configurable
    def __init__(self, **options: Any):
        """
        Args:
            **options: those of :class:`detectron2.modeling.RetinaNet`.
        """
        super().__init__(**options)
        use_products(self)
        join_level_norms(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_has_keys(cfg)
        check_choice("MODEL.SASA.HEAD", cfg.MODEL.SASA.HEAD, PRIMITIVES)
        check_norm("MODEL.RETINANET.NORM", cfg.MODEL.RETINANET.NORM)
        for name in cfg.MODEL.RETINANET.IN_FEATURES:
            levels = [f"p{level}" for level in range(2, 8)]
            check_choice("a feature of MODEL.RETINANET.IN_FEATURES", name, levels)
        # RetinaNet's own from_config has RetinaNetHead built in: give it the least of one.
        bare = cfg.clone()
        bare.defrost()
        bare.MODEL.RETINANET.NUM_CONVS = 1
        bare.MODEL.RETINANET.NORM = ""
        options = super().from_config(bare)
        shapes = options["backbone"].output_shape()
        input_shape = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        if cfg.MODEL.SASA.HEAD == "attention":
            options["head"] = AttentionRetinaNetHead(cfg, input_shape)
        else:
            head = RetinaNetHead.from_config(cfg, input_shape)
            if head["norm"] == "GN":
                # detectron2 0.6 tries the norm on one channel, too few for a norm of 32 groups.
                head["norm"] = lambda channels: nn.GroupNorm(min(32, channels), channels)
            options["head"] = RetinaNetHead(**head)
        return options

    def _transpose_dense_predictions(
        self, predictions: list[list[Tensor]], dims_per_anchor: list[int]
    ) -> list[list[Tensor]]:
        # TorchScript has no super(), and its lists no strict zip().
        transposed: list[list[Tensor]] = []
        for i, size in enumerate(dims_per_anchor):
            levels = predictions[i]
            if not self.training:
                # Of a model in half precision: anchors are float32, and NMS takes one type.
                levels = [level.float() for level in levels]
            transposed.append([permute_to_N_HWA_K(level, size) for level in levels])
        return transposed

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: of each level, R in all.
            pred_logits: (N, R_l, K) of each level.
            gt_labels: (R,) of each image, see :func:`focal_loss`.
            pred_anchor_deltas: (N, R_l, 4) of each level.
            gt_boxes: (R, 4) of each image.

        Returns:
            "loss_cls" and "loss_box_reg", scalars, as RetinaNet's.
        """
        labels = torch.stack(gt_labels)
        is_object = (labels >= 0) & (labels != self.num_classes)
        self._num_positive = is_object.sum()
        num_positive = int(self._num_positive)
        get_event_storage().put_scalar("num_pos_anchors", num_positive / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(num_positive, 1), 100)
        loss_cls = focal_loss(pred_logits, labels, self.focal_loss_alpha, self.focal_loss_gamma)
        loss_box_reg = _dense_box_regression_loss(
            *(anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, is_object),
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box_reg / normalizer}

    def _ema_update(
        self, name: str, value: float, initial_value: float, momentum: float = 0.9
    ) -> float:
        """Average the number of positive anchors of all processes together.

        detectron2 averages each process' own, so that the gradient of a batch depends on how it is
        split among processes.
        """
        # Without gradients processes may have different numbers of batches, as in evaluation.
        world_size = comm.get_world_size() if torch.is_grad_enabled() else 1
        if world_size > 1:
            total = self._num_positive.clone()
            torch.distributed.all_reduce(total)
            value = max(int(total), 1)
        # Gradients are averaged over the processes; the loss is a sum over the batch.
        return super()._ema_update(name, value, initial_value, momentum) / world_size
