"""Test-time augmentation, which detectron2 has for R-CNNs alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA, RetinaNet
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from .inference import infer_in_batches

_SUPPORTED = ("RetinaNet", "AttentionRetinaNet", "GeneralizedRCNN")


class RetinaNetWithTTA(nn.Module):
    """A RetinaNet with test-time augmentation, called as the RetinaNet itself.

    The boxes that it finds in the resized and flipped images are brought back to the image and
    merged by non-maximum suppression in each class, as those of detectron2's
    :class:`GeneralizedRCNNWithTTA`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: RetinaNet,
        tta_mapper: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
        batch_size: int = 3,
    ):
        """
        Args:
            cfg: a config, of which ``TEST.AUG`` is used.
            model: also after :func:`sasa_det.modeling.fuse`.
            tta_mapper: gives the augmented images, as detectron2's ``DatasetMapperTTA``.
            batch_size: how many augmented images go through the model at once, at most.
        """
        super().__init__()
        self.model = model
        self.tta_mapper = tta_mapper or DatasetMapperTTA(cfg)
        self.batch_size = batch_size

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: each with "image", (C, H, W), "height" and "width".

        Returns:
            list[dict]: "instances" for each input, as of RetinaNet.
        """
        return [{"instances": self._detect(sample)} for sample in batched_inputs]

    def _detect(self, sample: dict[str, Any]) -> Instances:
        augmented = self.tta_mapper(sample)
        transforms = [inputs.pop("transforms") for inputs in augmented]
        for inputs in augmented:
            # The boxes are wanted in pixels of the augmented image.
            inputs["height"], inputs["width"] = inputs["image"].shape[-2:]
        outputs = infer_in_batches(self.model, augmented, self.batch_size)
        boxes, found = [], [output["instances"] for output in outputs]
        for instances, transform in zip(found, transforms, strict=True):
            corners = instances.pred_boxes.tensor
            # The transforms are written in NumPy.
            back = transform.inverse().apply_box(corners.cpu().numpy())
            boxes.append(torch.as_tensor(back, dtype=corners.dtype, device=corners.device))
        merged = Instances((sample["height"], sample["width"]))
        merged.pred_boxes = Boxes(torch.cat(boxes))
        merged.scores = torch.cat([instances.scores for instances in found])
        merged.pred_classes = torch.cat([instances.pred_classes for instances in found])
        merged = detector_postprocess(merged, sample["height"], sample["width"])  # cuts boxes off
        kept = batched_nms(
            merged.pred_boxes.tensor,
            merged.scores,
            merged.pred_classes,
            self.model.test_nms_thresh,
        )
        return merged[kept[: self.model.max_detections_per_image]]


def check_augmentation(cfg: CfgNode) -> None:
    """Raise ValueError if a config asks for test-time augmentation of a model that has none."""
    if not cfg.TEST.AUG.ENABLED:
        return
    kind = cfg.MODEL.META_ARCHITECTURE
    if kind not in _SUPPORTED:
        raise ValueError(
            f"TEST.AUG.ENABLED must be False for MODEL.META_ARCHITECTURE {kind}: test-time "
            f"augmentation exists for {', '.join(_SUPPORTED)}."
        )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if kind == "GeneralizedRCNN" and cfg.MODEL[key]:
            raise ValueError(
                f"TEST.AUG.ENABLED must be False with MODEL.{key} True, for which detectron2 has "
                "no test-time augmentation."
            )


def with_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Return a detector with the test-time augmentation of ``TEST.AUG``.

    Its inputs are to be images as they were read: they are resized by ``TEST.AUG.MIN_SIZES``.

    Args:
        cfg: the config of the model.
        model: a RetinaNet, or an R-CNN, for which detectron2's own is used.

    Raises:
        ValueError: as :func:`check_augmentation`.
    """
    check_augmentation(cfg)
    wrapper = RetinaNetWithTTA if isinstance(model, RetinaNet) else GeneralizedRCNNWithTTA
    augmented = wrapper(cfg, model)
    # As the wrapper of a model in eval mode is not.
    augmented.training = model.training
    return augmented
