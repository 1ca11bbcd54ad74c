"""The metrics that the evaluations of a run have."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from .distributed import unsharded
from .errors import UsageError, nearest
from .tasks import task_of
from .validation_loss import validation_losses

__all__ = ["check_losses", "check_metrics"]

# What begins the names of losses on the data to test on.
_LOSSES = "validation/"


def check_metrics(cfg: CfgNode) -> None:
    """Check that evaluations will have the metrics that a config names.

    Args:
        cfg: the config of a run, whose data sets are registered.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` or ``TEST.EXPECTED_RESULTS`` and the nearest metric.
    """
    # A data set that is named twice has its results once.
    tests = list(dict.fromkeys(cfg.DATASETS.TEST))
    metrics = {name: task_of(cfg).metrics(cfg, _class_names(name)) for name in tests}
    if len(tests) == 1:
        known = metrics[tests[0]]
    else:
        known = [f"{name}/{metric}" for name in tests for metric in metrics[name]]
    _check_expected(cfg.TEST.EXPECTED_RESULTS, known if len(tests) == 1 else [])
    best = cfg.TEST.BEST_METRIC
    if best.startswith(_LOSSES) and cfg.TEST.VALIDATION_LOSS:
        return  # which check_losses looks at
    if cfg.MODEL.EMA.DECAY:
        known = known + [f"ema/{metric}" for metric in known]
    if best and best not in known:
        example = known[0] if known else "bbox/AP"
        raise UsageError(
            f"TEST.BEST_METRIC must be a metric of the evaluations, as {example}, with "
            f"MODEL.EMA.DECAY ema/{example}, or with TEST.VALIDATION_LOSS {_LOSSES}total_loss, "
            f"got {best}{nearest(best, known)}"
        )


def check_losses(cfg: CfgNode, model: nn.Module, batches: Iterable[Any]) -> None:
    """Check that a loss that ``TEST.BEST_METRIC`` names is one of the model's.

    Args:
        cfg: the config of a run.
        model: of the run.
        batches: of the data to test on, the first of which is read if a loss is named.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` and the nearest loss.
    """
    best = cfg.TEST.BEST_METRIC
    if not best.startswith(_LOSSES):
        return
    with unsharded(model):
        losses = validation_losses(model, itertools.islice(batches, 1))
    known = [f"{_LOSSES}{name}" for name in losses]
    if best not in known:
        raise UsageError(
            f"TEST.BEST_METRIC must be one of the losses {', '.join(known)}, got "
            f"{best}{nearest(best, known)}"
        )


def _class_names(dataset: str) -> Sequence[str]:
    return MetadataCatalog.get(dataset).thing_classes


def _check_expected(results: Sequence[Any], known: Sequence[str]) -> None:
    for expected in results:
        match expected:
            case (str(task), str(metric), float() | int(), float() | int()):
                if f"{task}/{metric}" in known:
                    continue
        raise UsageError(
            "TEST.EXPECTED_RESULTS must hold [task, metric, value, tolerance], as "
            "['bbox', 'AP', 38.5, 0.2], of the metrics of one data set in DATASETS.TEST, got "
            f"{expected!r}."
        )
