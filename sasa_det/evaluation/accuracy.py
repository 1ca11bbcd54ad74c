"""Top-1 and top-5 accuracy."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..errors import DatasetError
from ..utils.text import abbreviated_list

logger = logging.getLogger(__name__)


class ClassificationEvaluator(DatasetEvaluator):
    """Accuracy over the images of all processes.

    Images that cannot be read are left out of it, up to a limit, and counted.
    """

    def __init__(
        self, dataset_name: str, max_unreadable: int = 0, max_unreadable_fraction: float = 0.0
    ):
        """
        Args:
            dataset_name: of the data set, for messages.
            max_unreadable: images that may be left out.
            max_unreadable_fraction: the same as a fraction of all; the larger number counts.
        """
        self._dataset_name = dataset_name
        self._max_unreadable, self._max_fraction = max_unreadable, max_unreadable_fraction
        self.reset()

    def reset(self) -> None:
        self._images = self._top1 = self._top5 = 0
        self._unreadable: list[str] = []

    def process(self, inputs: Mapping[str, Any], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Take a batch.

        Args:
            inputs: "label", (N,) int64, and perhaps "unreadable", errors of images left out.
            outputs: "scores" of each image, (num_classes,).
        """
        for error in inputs.get("unreadable", ()):
            logger.warning("Left out of the evaluation: %s", error)
            self._unreadable.append(error.path)
        if not len(outputs):
            return
        scores = torch.stack([output["scores"] for output in outputs]).cpu()
        best = scores.topk(min(5, scores.shape[1])).indices
        hits = best == inputs["label"].cpu()[:, None]
        self._images += len(hits)
        self._top1 += int(hits[:, 0].sum())
        self._top5 += int(hits.sum())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Add up all processes.

        Returns:
            dict: "classification" with "top1" and "top5" in percent (with fewer than five classes
            the latter is 100), "images" and "unreadable", their numbers; empty but in the main
            process.

        Raises:
            DatasetError: if more images than allowed could not be read, or all.
        """
        parts = comm.all_gather((self._images, self._top1, self._top5, self._unreadable))
        images, top1, top5 = (sum(part[i] for part in parts) for i in range(3))
        unreadable = [path for part in parts for path in part[3]]
        total = images + len(unreadable)
        limit = max(self._max_unreadable, int(self._max_fraction * total))
        if len(unreadable) > limit or not images:
            raise DatasetError(
                f"{len(unreadable)} of {total} images of {self._dataset_name} cannot be read, and "
                f"{limit} may be left out (DATALOADER.SKIP_UNREADABLE, SKIP_UNREADABLE_FRACTION): "
                f"{abbreviated_list(unreadable, 10)}"
            )
        if not comm.is_main_process():
            return {}
        accuracies = {"top1": 100 * top1 / images, "top5": 100 * top5 / images}
        counts = {"images": images, "unreadable": len(unreadable)}
        return {"classification": {**accuracies, **counts}}
