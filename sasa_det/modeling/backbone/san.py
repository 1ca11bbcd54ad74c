"""SAN: residual networks of pairwise or patchwise self-attention, without spatial convolution."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ...config.defaults import check_has_keys
from ...config.recipe import recipe_keys
from ...layers import PairwiseAttention2d, PatchwiseAttention2d
from ...layers.mapping import why_not
from ...layers.norm import norm_kind
from ...layers.plain import is_plain_call
from ...layers.projection import runs_products
from ...ops.arguments import check_choice, check_type
from ..attention_options import check_norm
from ..normed_products import normed_products, normed_relu
from ..pointwise import is_product, use_products
from ..pooled import pooled_product, pooled_stem
from .attention_fpn import build_fpn, build_retinanet_fpn
from .training_warnings import WarnsInTraining

ATTENTIONS = {"pairwise": PairwiseAttention2d, "patchwise": PatchwiseAttention2d}
STAGES = ("stem", "res2", "res3", "res4", "res5")
CHANNELS = (64, 256, 512, 1024, 2048)
KERNEL_SIZES = (3, 7, 7, 7, 7)
# Blocks of every stage by depth (Table 1 of the paper).
NUM_BLOCKS = {10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}

MakeNorm = Callable[[int], nn.Module]


class _Block(nn.Module):
    """Pre-activation residual block around an attention layer, ``channels // 4`` wide."""

    def __init__(self, channels: int, make_attention: Callable[..., nn.Module], norm: MakeNorm):
        super().__init__()
        width = channels // 4
        self.norm1 = norm(channels)
        self.attention = make_attention(channels, width, relation_channels=width // 4, norm=norm)
        self.norm2 = norm(width)
        self.project = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or self.attention.is_reference:
            out = self.attention(F.relu(self.norm1(x)))
            return x + self.project(F.relu(self.norm2(out)))
        else:
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        attention, projected = self.attention, None
        if is_plain_call(attention):
            projections = (attention.query, attention.key, attention.value)
            projected = normed_products(x, self.norm1, projections)
        if projected is None:
            out = attention(F.relu(self.norm1(x)))
        else:
            *projected, x = projected
            out = attention.attend(*projected)
        projected = normed_products(out, self.norm2, (self.project,), residual=x)
        return x + self.project(F.relu(self.norm2(out))) if projected is None else projected[0]


class SANStage(CNNBlockBase):
    """2x2 max pool, pointwise layer to the stage's width, blocks, norm and ReLU.

    The first stage has them behind a pointwise layer on the image's pixels.
    """

    __constants__ = ["is_reference"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        make_attention: Callable[..., nn.Module],
        norm: MakeNorm,
        is_stem: bool,
    ):
        super().__init__(in_channels, out_channels, stride=2)
        width = out_channels if is_stem else in_channels
        self.transition = nn.Conv2d(width, out_channels, 1, bias=False)
        self.blocks = nn.Sequential(
            *(_Block(out_channels, make_attention, norm) for _ in range(num_blocks))
        )
        self.out_norm = norm(out_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False) if is_stem else None
        self.norm = norm(out_channels) if is_stem else None
        self.is_reference = self.blocks[0].attention.is_reference

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # alone, or TorchScript compiles what it cannot
            if self.conv is not None:
                check_type("a SAN", x, self.conv.weight.dtype)
        if torch.jit.is_scripting() or self.is_reference:
            if self.conv is not None and self.norm is not None:
                x = F.relu(self.norm(self.conv(x)))
            x = self.transition(F.max_pool2d(x, 2, ceil_mode=True))
            return F.relu(self.out_norm(self.blocks(x)))
        else:
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = self.blocks(self._enter(x))
        normed = normed_relu(x, self.out_norm)
        return F.relu(self.out_norm(x)) if normed is None else normed

    def can_replay(self, x: Tensor) -> bool:
        """Tell whether :func:`sasa_det.layers.replay.replayed` can run the stage.

        It keeps less than a checkpoint of PyTorch, and takes less time. A second run must be no
        more than numbers, and the modules that it would call have no hooks and keep their forward.
        """
        if self.is_reference or not (torch.is_grad_enabled() and runs_products(x)):
            return False
        if not any(p.requires_grad for p in self.parameters()):
            return False
        return all(_is_known(module, x) for module in self.modules() if module is not self)

    def _enter(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            entered = pooled_stem(x, self.conv, self.norm, self.transition)
            if entered is not None:
                return entered
            x = F.relu(self.norm(self.conv(x)))
        return pooled_product(x, self.transition)


def _is_known(module: nn.Module, x: Tensor) -> bool:
    """Tell whether a module within a stage is what it was built as, for images like ``x``."""
    parameters = [p for p in module._parameters.values() if p is not None]
    # A hook on a parameter would see its gradient twice.
    if any(type(p) is not nn.Parameter or p._backward_hooks for p in parameters):
        return False
    if not is_plain_call(module):
        return False
    if isinstance(module, PairwiseAttention2d | PatchwiseAttention2d):
        count = x.shape[0] * x.shape[-2:].numel() // 4
        return not module.is_reference and why_not(module.weights, x, count) is None
    if isinstance(module, nn.Conv2d):
        return is_product(module)
    containers = (_Block, nn.Sequential, nn.ReLU)
    return type(module) in containers or norm_kind(module) is not None


class SAN(WarnsInTraining, Backbone):
    """Self-attention network of "Exploring Self-attention for Image Recognition", Section 4.

    Zhao et al., CVPR 2020. Max pools round sizes up, where the published models round down, so that
    features have the sizes that detectors expect; multiples of 32 are the same for both. Weights
    start as PyTorch's layers draw them, like the published ones.
    """

    @configurable
    def __init__(
        self,
        *,
        depth: int = 10,
        attention: str = "pairwise",
        relation: str | None = None,
        position_size: int = 0,
        width_multiplier: float = 1.0,
        in_channels: int = 3,
        norm: str = "BN",
        num_classes: int | None = None,
        out_features: list[str] | None = None,
        freeze_at: int = 0,
        backend: str | None = None,
    ):
        """
        Args:
            depth: 10, 15 or 19.
            attention: "pairwise" or "patchwise".
            relation: see :class:`PairwiseAttention2d` and :class:`PatchwiseAttention2d`.
            position_size: side in pixels of the image over which the positions of pairwise
                attention run from -1 to 1, whatever the side of the image at hand; 0 for the
                latter, as published. The size of the images of pretraining keeps, at any size,
                the positions that were learned.
            width_multiplier: factor on the width of every layer, a multiple of 0.25. The weights
                of a window are as many at any width: as many more or fewer channels share one.
            in_channels: channels of the image.
            norm: see :func:`detectron2.layers.get_norm`.
            num_classes: number of outputs of the feature linear, which needs it.
            out_features: names of the features to return, of stem, res2 to res5 and linear; if
                None, linear if there is num_classes and else res5. What none of them needs is not
                built.
            freeze_at: number of stages to freeze, see :meth:`freeze`.
            backend: see :class:`PairwiseAttention2d`.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__()
        check_choice("depth (MODEL.SAN.DEPTH)", depth, NUM_BLOCKS)
        check_choice("attention (MODEL.SAN.ATTENTION)", attention, ATTENTIONS)
        layer = ATTENTIONS[attention]
        if relation is not None:
            check_choice(
                f"relation (MODEL.SAN.RELATION) of {attention} attention", relation, layer.relations
            )
        coarsest = 2 ** len(STAGES)
        if position_size != 0 and position_size <= coarsest:
            raise ValueError(
                "position_size (MODEL.SAN.POSITION_SIZE) must be 0 or more than the coarsest "
                f"stride, {coarsest}, got {position_size}."
            )
        check_norm("norm (MODEL.SAN.NORM)", norm)
        try:
            get_norm(norm, 1)
        except ValueError:
            raise ValueError(
                "norm (MODEL.SAN.NORM) must be a norm for any number of channels (BN, SyncBN, "
                f"FrozenBN, ...), got {norm!r}."
            ) from None
        if out_features is None:
            out_features = ["res5" if num_classes is None else "linear"]
        features = STAGES + (() if num_classes is None else ("linear",))
        for name in out_features:
            check_choice("a feature of out_features (MODEL.SAN.OUT_FEATURES)", name, features)
        if not out_features:
            raise ValueError(
                "out_features (MODEL.SAN.OUT_FEATURES) must name at least one feature."
            )

        self._out_features = out_features
        self._out_feature_channels, self._out_feature_strides = {}, {}
        last = max(
            ("res5" if name == "linear" else name for name in out_features), key=STAGES.index
        )
        self.stage_names = STAGES[: STAGES.index(last) + 1]
        widths = _widths(width_multiplier)
        channels, stride = in_channels, 1
        for i, name in enumerate(self.stage_names):
            stride *= 2
            options: dict[str, Any] = {
                "kernel_size": KERNEL_SIZES[i],
                "relation": relation,
                "backend": backend,
                # As many weights as at full width, where 8 channels share one.
                "share_channels": int(8 * width_multiplier),
            }
            if attention == "pairwise":
                options["position_size"] = -(-position_size // stride)
            stage = SANStage(
                channels,
                widths[i],
                NUM_BLOCKS[depth][i],
                partial(layer, **options),
                lambda channels: get_norm(norm, channels) or nn.Identity(),
                is_stem=name == "stem",
            )
            self.add_module(name, stage)
            channels = widths[i]
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride
        self.linear = None
        if "linear" in out_features:
            self.linear = nn.Linear(channels, num_classes)
            self._out_feature_channels["linear"] = num_classes
            self._out_feature_strides["linear"] = None
        use_products(self)
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        check_has_keys(cfg)
        san = cfg.MODEL.SAN
        return {
            "depth": san.DEPTH,
            "attention": san.ATTENTION,
            "relation": san.RELATION or None,
            "position_size": san.POSITION_SIZE,
            "width_multiplier": san.WIDTH_MULTIPLIER,
            "in_channels": input_shape.channels,
            "norm": san.NORM,
            "num_classes": (
                cfg.MODEL.CLASSIFIER.NUM_CLASSES if "linear" in san.OUT_FEATURES else None
            ),
            "out_features": san.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "backend": cfg.MODEL.SASA.BACKEND or None,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, in_channels, H, W), any H, W >= 1.

        Returns:
            dict[str, Tensor]: the features of ``out_features``: (N, C, ceil(H / stride),
            ceil(W / stride)), and of linear (N, num_classes).
        """
        outputs = {}
        for name, module in self.named_children():  # as TorchScript can iterate over them
            x = module(x.mean((2, 3)) if name == "linear" else x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> "SAN":
        """Fix the weights of the first stages, and turn their batch norms into frozen ones.

        Args:
            freeze_at: number of stages: 1 freezes the stem, 2 the stem and res2, and so on.

        Returns:
            SAN: this one.
        """
        for number, name in enumerate(self.stage_names, start=1):
            if freeze_at >= number:
                getattr(self, name).freeze()
        return self


def _widths(factor: float) -> list[int]:
    """Return the channels of the stages, a sixteenth of which are those of relations."""
    if not (factor > 0 and factor % 0.25 == 0):
        raise ValueError(
            "width_multiplier (MODEL.SAN.WIDTH_MULTIPLIER) must be a positive multiple of 0.25, "
            f"got {factor}."
        )
    return [int(channels * factor) for channels in CHANNELS]


@BACKBONE_REGISTRY.register()
def build_san_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SAN:
    """Build a :class:`SAN` from ``MODEL.SAN``.

    Its features stem and res2 to res5 have strides 2, 4, 8, 16 and 32.
    """
    backbone = SAN(cfg, input_shape)
    backbone.recipe_keys = tuple(recipe_keys(cfg))
    return backbone


@BACKBONE_REGISTRY.register()
def build_san_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a SAN with the FPN of ``MODEL.SASA.FPN`` for R-CNN: p2 to p5, and p6 by max pooling."""
    return build_fpn(cfg, build_san_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_san_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a SAN with the FPN of ``MODEL.SASA.FPN`` for RetinaNet: p3 to p7."""
    return build_retinanet_fpn(cfg, build_san_backbone(cfg, input_shape))
