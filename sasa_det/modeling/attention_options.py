"""How the config describes attention layers."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import get_norm

PRIMITIVES = ("attention", "convolution")


def attention_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the keywords of :class:`sasa_det.layers.LocalSelfAttention2d` that all layers share."""
    sasa = cfg.MODEL.SASA
    return {
        "kernel_size": sasa.KERNEL_SIZE,
        "num_heads": sasa.NUM_HEADS,
        "position": sasa.POSITION,
        "content": sasa.CONTENT,
        "border": sasa.BORDER,
        "backend": sasa.BACKEND or None,
        "qk_norm": sasa.QK_NORM or None,
        "scale_logits": sasa.SCALE_LOGITS,
    }


def check_norm(name: str, value: Any) -> None:
    """Raise ValueError, with ``name`` in it, unless detectron2 knows the norm ``value``."""
    try:
        get_norm(value, 32)
    except KeyError:
        raise ValueError(
            f"{name} must be a norm of detectron2 (BN, SyncBN, FrozenBN, GN, ...), got {value!r}."
        ) from None
