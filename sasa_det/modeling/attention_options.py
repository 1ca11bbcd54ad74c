"""How the config describes attention layers."""

from typing import Any

from detectron2.config import CfgNode

__all__ = ["attention_options", "check_choice"]

PRIMITIVES = ("attention", "convolution")


def attention_options(cfg: CfgNode) -> dict[str, Any]:
    """Read the keyword arguments that all attention layers of a model share.

    Args:
        cfg: a config with sasa_det's keys.

    Returns:
        dict: keywords of :class:`sasa_det.layers.LocalSelfAttention2d`.
    """
    sasa = cfg.MODEL.SASA
    return {
        "kernel_size": sasa.KERNEL_SIZE,
        "num_heads": sasa.NUM_HEADS,
        "position": sasa.POSITION,
        "content": sasa.CONTENT,
        "border": sasa.BORDER,
        "backend": sasa.BACKEND or None,
    }


def check_choice(name: str, value: Any, allowed) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
