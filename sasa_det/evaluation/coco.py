"""COCO's metrics."""

from detectron2.evaluation import COCOEvaluator

__all__ = ["coco_evaluator"]


def coco_evaluator(dataset_name: str, output_dir: str | None = None) -> COCOEvaluator:
    """Make detectron2's evaluator, with its compiled matching where detectron2 has it.

    Args:
        dataset_name: a registered data set.
        output_dir: folder of the detections that are written; None to write none.
    """
    fast = _has_compiled_evaluation()
    return COCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=fast)


def _has_compiled_evaluation() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")
