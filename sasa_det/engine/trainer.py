"""The trainer: detectron2's with this project's data, optimizer and evaluation."""

import os
import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..data.mapper import build_jitter_crop_mapper

__all__ = ["Trainer", "build_optimizer"]

# Learned embeddings are no weights of a linear map: like norms they do not decay.
_EMBEDDINGS = ("rel_rows", "rel_cols", "row_embedding", "col_embedding", "mixture_embedding")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``SOLVER.OPTIMIZER`` names.

    Args:
        cfg: a config with sasa_det's keys.
        model: its parameters that require gradients are optimized.

    Returns:
        torch.optim.Optimizer: SGD as detectron2 builds it, or AdamW without weight decay on
        embeddings and with ``SOLVER.WEIGHT_DECAY_NORM`` on norms.

    Raises:
        ValueError: if the name is neither SGD nor AdamW.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            overrides={name: {"weight_decay": 0.0} for name in _EMBEDDINGS},
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, lr=cfg.SOLVER.BASE_LR)
    raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got {cfg.SOLVER.OPTIMIZER!r}.")


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
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind != "coco":
            raise ValueError(
                f"DATASETS.TEST {dataset_name} must be a data set of evaluator_type 'coco', "
                f"got {kind!r}."
            )
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
        super().load_state_dict(state_dict)
        if "load_state_dict" not in vars(DefaultTrainer):
            self._trainer.load_state_dict(state_dict["_trainer"])
