"""The attention ResNet-50 that is the backbone of all models."""

from detectron2.config import LazyCall as L

from sasa_det.modeling import SASAResNet

bottom_up = L(SASAResNet)(
    depth=50,
    stem="attention",
    attention_stages=["res2", "res3", "res4", "res5"],
    # Options of every attention layer outside the stem; an attentional FPN and head use them, too.
    attention=dict(
        kernel_size=7,
        num_heads=8,
        position="relative",
        content=True,
        border="mask",
        backend=None,  # selects the fastest
        qk_norm=None,
        scale_logits=False,
    ),
    stem_options=dict(
        num_heads=4,
        num_mixtures=4,
        values="mixture",
        relative=True,
        backend="${..attention.backend}",
    ),
    width_multiplier=1.0,
    norm="SyncBN",
    out_features=["res3", "res4", "res5"],
    freeze_at=0,
)
