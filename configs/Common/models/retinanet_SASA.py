"""RetinaNet on the attention ResNet, with attentional FPN, P6, P7 and heads."""

from sasa_det.modeling import AttentionFPN, AttentionRetinaNetHead
from sasa_det.modeling.backbone import LastLevelP6P7Attention

from .retinanet import model

model.backbone._target_ = AttentionFPN
model.backbone.attention = "${.bottom_up.attention}"
model.backbone.top_block._target_ = LastLevelP6P7Attention
model.backbone.top_block.attention = "${..bottom_up.attention}"
model.head._target_ = AttentionRetinaNetHead
model.head.attention = "${..backbone.bottom_up.attention}"
model.head.mixing_layer = False
