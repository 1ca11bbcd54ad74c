"""Building what a config describes once, so that its mistakes are told before a run begins."""

import re

from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_model,
)
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.sources import locate
from ..data.class_order import check_same_classes, classes_in
from ..modeling.batch_norm import check_batch_norms
from ..modeling.rcnn import check_res5_heads
from .errors import UsageError, nearest
from .model_options import checkpoint_stages
from .optimizer import build_optimizer
from .tasks import task_of

__all__ = ["BUILD_ERRORS", "check_model", "check_weights", "explain_build_error"]

# The keys whose names detectron2 looks up in its registries.
_REGISTRIES = {
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}

# What models, optimizers and mappers raise over a config that they cannot be built from.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_model(
    cfg: CfgNode, *, eval_only: bool, weights: str = "", num_processes: int = 1
) -> None:
    """Build model, mappers and, for training, the optimizer of a config on the CPU.

    Args:
        cfg: the config of a run.
        eval_only: whether the run evaluates without training.
        weights: what the run starts from, which is loaded into the model; "" for nothing.
        num_processes: of the run, on all machines.

    Raises:
        UsageError: in one sentence, from the error that building raised.
        CheckpointError: if the weights cannot be used or do not fit the model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_model(cfg)
        check_res5_heads(model)
        if not eval_only:
            _check_single_values(cfg, model, num_processes)
        checkpoint_stages(model.backbone, cfg.MODEL.ACTIVATION_CHECKPOINTING)
        task_of(cfg).build_mappers(cfg, eval_only)
        if not eval_only:
            build_optimizer(cfg, model)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
    check_weights(cfg, model, weights, strict=eval_only)


def _check_single_values(cfg: CfgNode, model: nn.Module, num_processes: int) -> None:
    """Check the batch norms of a run whose images are all of one size."""
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        side = cfg.INPUT.CLASSIFICATION.CROP_SIZE
    elif cfg.INPUT.JITTER.ENABLED:
        side = cfg.INPUT.JITTER.CROP_SIZE
    else:
        return
    synchronized = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    if num_processes > 1 and any(isinstance(m, synchronized) for m in model.modules()):
        return
    batch_size = cfg.SOLVER.IMS_PER_BATCH // (num_processes * cfg.SOLVER.ACCUMULATION_STEPS)
    if batch_size == 1:  # or there is more than one value
        check_batch_norms(model, batch_size, side)


def check_weights(cfg: CfgNode, model: nn.Module, weights: str, *, strict: bool) -> None:
    """Load the weights that a run starts from into its model.

    Args:
        cfg: the config of the run.
        model: is not to be used afterwards.
        weights: "" for none.
        strict: whether they must fill the whole model.

    Raises:
        UsageError: if they do not exist.
        CheckpointError: if they cannot be used or do not fit the model.
        DatasetError: if the data to test on have other classes than a whole model.
    """
    if weights:
        if not locate(weights).path.is_file():
            raise UsageError(f"MODEL.WEIGHTS {weights} does not exist.")
        loaded = Checkpointer(model, strict=strict, allow=cfg.MODEL.WEIGHTS_ALLOW).load(weights)
        classes = classes_in(loaded)
        if strict and classes is not None:
            check_same_classes(cfg.DATASETS.TEST, classes, f"MODEL.WEIGHTS {weights}")


def explain_build_error(error: Exception) -> str:
    """Turn one of :data:`BUILD_ERRORS` into one sentence."""
    message = (str(error.args[0]) if error.args else "").strip().partition("\n")[0]
    unregistered = re.fullmatch(r"No object named '(.*)' found in '(.*)' registry!", message)
    for key, registry in _REGISTRIES.items():
        if unregistered and registry._name == unregistered[2]:
            known = [name for name, _ in registry]
            return f"{key} {unregistered[1]} is not registered{nearest(unregistered[1], known)}"
    if isinstance(error, ValueError) and message:
        return message
    return (
        f"the config does not fit together: {type(error).__name__}: {message} (with "
        "SASA_DET_TRACEBACK=1 in the environment, the traceback is printed)."
    )
