"""The ResNet of this project under the FPNs of others."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from ...config.defaults import check_has_keys
from ...errors import UsageError, nearest
from .sasa_resnet import build_sasa_resnet_backbone

# What builders of feature pyramids call, by this name in their module.
_CALLED = "build_resnet_backbone"


@BACKBONE_REGISTRY.register()
def build_other_backbone_with_sasa_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a backbone of another project on a :class:`SASAResNet`.

    ``MODEL.SASA.BUILDER`` names its builder, which calls detectron2's ``build_resnet_backbone`` for
    what its feature pyramid stands on; it gets :func:`build_sasa_resnet_backbone` instead.

    Raises:
        UsageError: if no builder has this name, or it does not call that function by its name.
    """
    check_has_keys(cfg)
    name = cfg.MODEL.SASA.BUILDER
    known = [each for each, _ in BACKBONE_REGISTRY]
    if name not in known:
        raise UsageError(
            "MODEL.SASA.BUILDER must be the name of a registered backbone for "
            f"build_other_backbone_with_sasa_resnet, got {name!r}{nearest(name, known)}"
        )
    builder = BACKBONE_REGISTRY.get(name)
    code, module = getattr(builder, "__code__", None), getattr(builder, "__globals__", {})
    if code is None or _CALLED not in code.co_names or _CALLED not in module:
        raise UsageError(
            f"MODEL.SASA.BUILDER {name} does not call {_CALLED}, in place of which "
            "build_other_backbone_with_sasa_resnet puts the attention ResNet."
        )
    replaced = module[_CALLED]
    module[_CALLED] = build_sasa_resnet_backbone
    try:
        return builder(cfg, input_shape)
    finally:
        module[_CALLED] = replaced
