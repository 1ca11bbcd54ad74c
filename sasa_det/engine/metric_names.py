"""The metrics that the evaluations of a run have."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from .errors import UsageError, nearest
from .tasks import task_of

__all__ = ["check_metrics"]


def check_metrics(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Check that evaluations will have the metrics that a config names.

    Args:
        cfg: the config of a run.
        class_names: of the data to test on.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` or ``TEST.EXPECTED_RESULTS`` and the nearest metric.
    """
    model, tests, best = cfg.MODEL, cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC
    known = task_of(cfg).metrics(cfg, class_names)
    metric = known[0]
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if len(expected) != 4 or f"{expected[0]}/{expected[1]}" not in known:
            raise UsageError(
                "TEST.EXPECTED_RESULTS must hold [task, metric, value, tolerance], as "
                f"['bbox', 'AP', 38.5, 0.2], got {expected!r}."
            )
    if len(tests) != 1:
        known = [f"{dataset}/{metric}" for dataset in tests for metric in known]
    if model.EMA.DECAY:
        known += [f"ema/{metric}" for metric in known]
    if best.startswith("validation/") and cfg.TEST.VALIDATION_LOSS:
        return
    if best and best not in known:
        raise UsageError(
            f"TEST.BEST_METRIC must be a metric of the evaluations, as {metric}, with "
            f"MODEL.EMA.DECAY ema/{metric}, or with TEST.VALIDATION_LOSS validation/total_loss, "
            f"got {best}{nearest(best, known)}"
        )
