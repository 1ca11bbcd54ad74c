"""COCO's metrics."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from detectron2.evaluation import COCOEvaluator


def coco_evaluator(
    dataset_name: str,
    output_dir: str | None = None,
    *,
    max_dets_per_image: int = 100,
    kpt_oks_sigmas: Sequence[float] = (),
) -> COCOEvaluator:
    """Make detectron2's evaluator, with its compiled matching where detectron2 has it.

    Args:
        dataset_name: a registered data set.
        output_dir: folder of the detections that are written; None to write none.
        max_dets_per_image: how many detections the model gives for an image at most. AP counts
            all of them, and is COCO's, which counts 100, unless they are more.
        kpt_oks_sigmas: of the keypoints, as ``TEST.KEYPOINT_OKS_SIGMAS``; COCO's if empty.
    """
    return _Evaluator(
        dataset_name,
        output_dir=output_dir,
        # Of less than COCO's 100 there are none to cut off.
        max_dets_per_image=max(max_dets_per_image, 100),
        use_fast_impl=_has_compiled_evaluation(),
        kpt_oks_sigmas=kpt_oks_sigmas,
    )


class _Evaluator(COCOEvaluator):
    """detectron2's evaluator for data sets whose class indices do not follow the category ids."""

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        # pycocotools has the precisions in the order of the ids.
        indices = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_names is not None and indices is not None:
            class_names = [class_names[indices[identity]] for identity in sorted(indices)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)


def coco_metrics(task: str, class_names: Sequence[str]) -> list[str]:
    """List the metrics that detectron2's evaluator has of a task once something was detected.

    Args:
        task: "bbox", "segm" or "keypoints".
        class_names: of the data set.

    Returns:
        list[str]: names as in "AP50" and, where there is more than one class, "AP-cat".
    """
    evaluator = COCOEvaluator.__new__(COCOEvaluator)  # which would read the data set
    evaluator._logger = logging.Logger(__name__, logging.CRITICAL)
    # What COCO's evaluation leaves behind: twelve numbers, and precisions by IoU, recall, class,
    # size and number of detections.
    precision = np.zeros((1, 1, len(class_names), 1, 1))
    evaluation = SimpleNamespace(stats=np.zeros(12), eval={"precision": precision})
    return list(evaluator._derive_coco_results(evaluation, task, class_names))


def _has_compiled_evaluation() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")
