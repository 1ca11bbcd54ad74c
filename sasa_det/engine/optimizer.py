"""The optimizer of a config."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..layers import AttentionStem, LocalSelfAttention2d

__all__ = ["build_optimizer", "max_gradient_norm"]

# Learned embeddings are no weights of a linear map: like norms they do not decay.
_EMBEDDINGS = ("rel_rows", "rel_cols", "row_embedding", "col_embedding", "mixture_embedding")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``SOLVER.OPTIMIZER`` names.

    Args:
        cfg: a config with sasa_det's keys.
        model: its parameters that require gradients are optimized.

    Returns:
        torch.optim.Optimizer: SGD or AdamW, with detectron2's settings for norms and biases and
        without weight decay on learned embeddings, and with ``SOLVER.LOGIT_LR_FACTOR`` on the
        learning rate of attention's query and key projections.

    Raises:
        ValueError: if the name is neither SGD nor AdamW.
    """
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={name: {"weight_decay": 0.0} for name in _EMBEDDINGS},
    )
    if solver.LOGIT_LR_FACTOR != 1.0:
        params = _with_lr_factor(params, _logit_weights(model), solver.LOGIT_LR_FACTOR)
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.OPTIMIZER == "AdamW":
        optimizer, options = torch.optim.AdamW, {}
    else:
        raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got {solver.OPTIMIZER!r}.")
    if max_gradient_norm(cfg) is None:
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer(params, lr=solver.BASE_LR, **options)


def max_gradient_norm(cfg: CfgNode) -> float | None:
    """Return what the norm of all gradients together is clipped to, or None.

    Args:
        cfg: ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "full_model" asks for it; "value" and "norm", which
            are detectron2's, clip each parameter's gradient on its own.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return clip.CLIP_VALUE if clip.ENABLED and clip.CLIP_TYPE == "full_model" else None


def _logit_weights(model: nn.Module) -> set[nn.Parameter]:
    """Collect the weights of all query and key projections."""
    layers = [m for m in model.modules() if isinstance(m, (LocalSelfAttention2d, AttentionStem))]
    projections = [p for layer in layers for p in (layer.query, layer.key) if p is not None]
    return {projection.weight for projection in projections}


def _with_lr_factor(
    groups: list[dict[str, Any]], chosen: set[nn.Parameter], factor: float
) -> list[dict[str, Any]]:
    """Split parameter groups so that the chosen parameters learn at ``factor`` times the rate."""
    split = []
    for group in groups:
        inside = [p for p in group["params"] if p in chosen]
        outside = [p for p in group["params"] if p not in chosen]
        if outside:
            split.append({**group, "params": outside})
        if inside:
            split.append({**group, "params": inside, "lr": group["lr"] * factor})
    return split
