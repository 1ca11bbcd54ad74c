"""The metrics that the evaluations of a run have."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from .errors import UsageError, nearest

__all__ = ["check_best_metric"]

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def check_best_metric(cfg: CfgNode, class_names: Sequence[str]) -> None:
    """Check that evaluations will have the metric whose best value is asked for.

    Args:
        cfg: the config of a run.
        class_names: of the data to test on.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` and the nearest metric.
    """
    name = cfg.TEST.BEST_METRIC
    if not name or (name.startswith("validation/") and cfg.TEST.VALIDATION_LOSS):
        return
    model, tests = cfg.MODEL, cfg.DATASETS.TEST
    asked = {"bbox": True, "segm": model.MASK_ON, "keypoints": model.KEYPOINT_ON}
    metrics = (*_METRICS, *(f"AP-{class_name}" for class_name in class_names))
    known = [f"{task}/{metric}" for task in asked if asked[task] for metric in metrics]
    if len(tests) != 1:
        known = [f"{dataset}/{metric}" for dataset in tests for metric in known]
    if model.EMA.DECAY:
        known += [f"ema/{metric}" for metric in known]
    if name not in known:
        raise UsageError(
            "TEST.BEST_METRIC must be a metric of the evaluations, as bbox/AP, with "
            "MODEL.EMA.DECAY ema/bbox/AP, or with TEST.VALIDATION_LOSS validation/total_loss, got "
            f"{name}{nearest(name, known)}"
        )
