"""The optimizer, and the learning rate and weight decay of each parameter."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..config.options import RunOptions
from ..config.read_keys import mark_read
from ..layers import AttentionStem, LocalSelfAttention2d
from ..modeling import Classifier

# Learned embeddings and the scales of heads are not weights of a linear layer: like norms, they do
# not decay.
_EMBEDDINGS = ("rel_rows", "rel_cols", "row_embedding", "col_embedding", "mixture_embedding")
_HEAD_SCALES = ("channel_scale", "logit_scale")

# The setting of a parameter group that the schedule reads, see LearningRate.
WARMUP_ITERS = "warmup_iters"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``SOLVER.OPTIMIZER`` names.

    Args:
        cfg: a config with sasa_det's keys.
        model: its parameters that require gradients are optimized.

    Returns:
        torch.optim.Optimizer: SGD or AdamW on the :func:`parameter_groups` of the model.

    Raises:
        ValueError: if the name is neither SGD nor AdamW.
    """
    mark_read("SOLVER.OPTIMIZER", "SOLVER.*LR_FACTOR", "SOLVER.WEIGHT_DECAY_*")
    solver = cfg.SOLVER
    params = parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        weight_decay_embedding=solver.WEIGHT_DECAY_EMBEDDING,
        logit_lr_factor=solver.LOGIT_LR_FACTOR,
        stem_logit_lr_factor=solver.STEM_LOGIT_LR_FACTOR or None,
        linear_lr_factor=solver.LINEAR_LR_FACTOR or None,
        weight_decay_logit=solver.WEIGHT_DECAY_LOGIT,
        logit_warmup_iters=solver.LOGIT_WARMUP_ITERS,
    )
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    elif solver.OPTIMIZER == "AdamW":
        optimizer, options = torch.optim.AdamW, {}
    else:
        raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got {solver.OPTIMIZER!r}.")
    optimizer = with_clipping(optimizer, RunOptions.read(cfg))
    # The fused kernel takes a tenth of the time of PyTorch's default on a CPU. PyTorch has no fused
    # SGD for shards.
    return optimizer(params, lr=solver.BASE_LR, fused=not cfg.MODEL.FSDP, **options)


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
    weight_decay_embedding: float = 0.0,
    logit_lr_factor: float = 1.0,
    stem_logit_lr_factor: float | None = None,
    linear_lr_factor: float | None = None,
    weight_decay_logit: float | None = None,
    logit_warmup_iters: int = 0,
) -> list[dict[str, Any]]:
    """Group a model's parameters by learning rate and weight decay, for an optimizer.

    Args:
        model: its parameters that require gradients are grouped.
        base_lr: learning rate.
        weight_decay: of all but norms, biases and embeddings.
        weight_decay_norm: of norms, and of the scales that norms of attention heads learn.
        bias_lr_factor: on the learning rate of biases.
        weight_decay_bias: of biases; None for ``weight_decay``.
        weight_decay_embedding: of learned embeddings.
        logit_lr_factor: on the learning rate of attention's query and key projections and of a
            classifier's linear layer.
        stem_logit_lr_factor: the same for the attention stem; None for ``logit_lr_factor``.
        linear_lr_factor: the same for a classifier's linear layer; None for ``logit_lr_factor``.
        weight_decay_logit: of query and key projections; None for ``weight_decay``.
        logit_warmup_iters: iterations during which the learning rate of query and key projections
            rises linearly from 0.

    Returns:
        list[dict]: groups with "params", "lr", "weight_decay" and, of those with a warmup of their
        own, its iterations as "warmup_iters", which the trainer's schedule reads.
    """
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
        overrides={
            **{name: {"weight_decay": weight_decay_embedding} for name in _EMBEDDINGS},
            **{name: {"weight_decay": weight_decay_norm} for name in _HEAD_SCALES},
        },
    )
    # Together where they can be: checkpoints hold the optimizer's state group by group.
    factors: dict[float, set[nn.Parameter]] = {}
    for factor, weights in (
        (logit_lr_factor, _query_and_key(model, LocalSelfAttention2d)),
        (linear_lr_factor, _linear_layers(model)),
        (stem_logit_lr_factor, _query_and_key(model, AttentionStem)),
    ):
        factor = logit_lr_factor if factor is None else factor
        factors[factor] = factors.get(factor, set()) | weights
    for factor, chosen in factors.items():
        if factor != 1.0:
            groups = _split(groups, chosen, lambda group, by=factor: {"lr": group["lr"] * by})
    settings: dict[str, Any] = {}
    if weight_decay_logit is not None:
        settings["weight_decay"] = weight_decay_logit
    if logit_warmup_iters:
        settings[WARMUP_ITERS] = logit_warmup_iters
    if settings:
        projections = _query_and_key(model, (LocalSelfAttention2d, AttentionStem))
        groups = _split(groups, projections, lambda _: settings)
    return groups


def max_gradient_norm(options: RunOptions) -> float | None:
    """Return the norm to which all gradients together are clipped, or None.

    Args:
        options: it is clipped with ``clip_type`` "full_model". detectron2's "value" and "norm" clip
            the gradient of each parameter separately.
    """
    full_model = options.clip_enabled and options.clip_type == "full_model"
    return options.clip_value if full_model else None


def with_clipping(
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer], options: RunOptions
) -> Any:
    """Add detectron2's gradient clipping to an optimizer or its class, if it is enabled."""
    if max_gradient_norm(options) is not None:
        return optimizer  # the training loop clips
    clip = {
        "ENABLED": options.clip_enabled,
        "CLIP_TYPE": options.clip_type,
        "CLIP_VALUE": options.clip_value,
        "NORM_TYPE": options.norm_type,
    }
    solver = CfgNode({"SOLVER": CfgNode({"CLIP_GRADIENTS": CfgNode(clip)})})
    return maybe_add_gradient_clipping(solver, optimizer)


def _linear_layers(model: nn.Module) -> set[nn.Parameter]:
    """Collect the weights and biases that compute the logits of classes."""
    classifiers = (module for module in model.modules() if isinstance(module, Classifier))
    return {parameter for module in classifiers for parameter in module.head.parameters()}


def _query_and_key(
    model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> set[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, kind)]
    projections = [p for layer in layers for p in (layer.query, layer.key) if p is not None]
    return {projection.weight for projection in projections}


def _split(
    groups: list[dict[str, Any]],
    chosen: set[nn.Parameter],
    settings: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Split parameter groups so that the chosen parameters have other settings than the rest."""
    split = []
    for group in groups:
        inside = [p for p in group["params"] if p in chosen]
        outside = [p for p in group["params"] if p not in chosen]
        if outside:
            split.append({**group, "params": outside})
        if inside:
            split.append({**group, **settings(group), "params": inside})
    return split
