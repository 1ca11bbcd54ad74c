"""RetinaNet on pairwise SAN10, with convolutional FPN and heads."""

from detectron2.config import LazyCall as L

from sasa_det.modeling import SAN

from .retinanet import model

model.backbone.bottom_up = L(SAN)(
    depth=10,
    attention="pairwise",
    relation=None,  # selects that of the paper's models
    position_size=224,  # the images of pretraining
    width_multiplier=1.0,
    norm="BN",  # with SyncBN all relations of pixels would be in memory
    out_features=["res3", "res4", "res5"],
    freeze_at=0,
)
