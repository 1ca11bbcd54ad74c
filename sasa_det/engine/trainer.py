"""The trainer: detectron2's with this project's data, optimizer and evaluation."""

import logging
import os
import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..data.mapper import build_jitter_crop_mapper
from ..layers import AttentionStem, LocalSelfAttention2d

__all__ = ["Trainer", "build_optimizer"]

logger = logging.getLogger(__name__)

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
        options = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
            params, lr=solver.BASE_LR, **options
        )
    if solver.OPTIMIZER == "AdamW":
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, lr=solver.BASE_LR)
    raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got {solver.OPTIMIZER!r}.")


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


def _has_compiled_evaluation() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")


class Trainer(DefaultTrainer):
    """detectron2's default trainer with jittered crops, a choice of optimizer and COCO AP."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        if cfg.INPUT.JITTER.ENABLED:
            return build_detection_train_loader(cfg, mapper=build_jitter_crop_mapper(cfg))
        return build_detection_train_loader(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> COCOEvaluator:
        if output_folder is None:
            # Data named on the command line is registered under its path.
            folder = re.sub(r"[^\w.-]+", "_", dataset_name.strip("/"))
            output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", folder)
        return COCOEvaluator(
            dataset_name,
            output_dir=output_folder,
            use_fast_impl=_has_compiled_evaluation(),
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 leaves the optimizer out.
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint holds no optimizer state: the optimizer starts anew.")
            state_dict = {**state_dict, "_trainer": self._trainer.state_dict()}
        super().load_state_dict(state_dict)
        if "load_state_dict" not in vars(DefaultTrainer):
            self._trainer.load_state_dict(state_dict["_trainer"])
