"""The evaluator of a data set, by the ``evaluator_type`` in its metadata."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from .coco import coco_evaluator


def _semantic(name: str, folder: str, **_: Any) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


def _panoptic(name: str, folder: str, **coco: Any) -> DatasetEvaluator:
    panoptic = COCOPanopticEvaluator(name, os.path.join(folder, "panoptic"))
    return DatasetEvaluators(
        [_semantic(name, folder), coco_evaluator(name, folder, **coco), panoptic]
    )


# Of detectron2's builtin data sets, with the evaluators of its tools/train_net.py.
_EVALUATORS: dict[str, Callable[..., DatasetEvaluator]] = {
    "coco": coco_evaluator,
    "coco_panoptic_seg": _panoptic,
    "sem_seg": _semantic,
    "lvis": lambda name, folder, **_: LVISEvaluator(name, output_dir=folder),
    "pascal_voc": lambda name, folder, **_: PascalVOCDetectionEvaluator(name),
    "cityscapes_instance": lambda name, folder, **_: CityscapesInstanceEvaluator(name),
    "cityscapes_sem_seg": lambda name, folder, **_: CityscapesSemSegEvaluator(name),
}
EVALUATOR_TYPES = tuple(_EVALUATORS)


def evaluator_by_type(
    dataset_name: str,
    output_dir: str,
    *,
    max_dets_per_image: int = 100,
    kpt_oks_sigmas: Sequence[float] = (),
) -> DatasetEvaluator:
    """Make detectron2's evaluator for a data set.

    Args:
        dataset_name: a registered data set, whose metadata have an ``evaluator_type`` of
            :data:`EVALUATOR_TYPES`.
        output_dir: folder of the results.
        max_dets_per_image, kpt_oks_sigmas: as of :func:`~sasa_det.evaluation.coco.coco_evaluator`,
            for data sets with COCO's metrics.

    Raises:
        KeyError: if the type is another one.
    """
    make = _EVALUATORS[MetadataCatalog.get(dataset_name).evaluator_type]
    return make(
        dataset_name,
        output_dir,
        max_dets_per_image=max_dets_per_image,
        kpt_oks_sigmas=kpt_oks_sigmas,
    )
