"""From a record to the model's input; in training multiscale jitter and crop (appendix A.3)."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, Keypoints, PolygonMasks

from ..config.read_keys import mark_read
from .images import check_size, read_image
from .tiling import Tile, boxes_in_tile


def jitter_and_crop_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Augmentations that scale an image at random, cut a square out of it, recolor and flip it.

    In training the image is resized, its aspect ratio kept, to the largest size that fits into a
    square of ``CROP_SIZE`` times a factor drawn from [``MIN_SCALE``, ``MAX_SCALE``] (of
    ``INPUT.JITTER``). Where it exceeds the crop a random window is taken, the same fraction of the
    room being left off on both axes; where it falls short it is padded on the right and at the
    bottom with the value 128, detectron2's default. Then brightness, contrast and saturation change
    by up to ``COLOR``.

    Args:
        cfg: a config with sasa_det's keys.
        is_train: False gives detectron2's usual resizing for inference.

    Raises:
        ValueError: if a config value is out of range; the message names the key.
    """
    if not is_train:
        return detection_utils.build_augmentation(cfg, is_train=False)
    jitter, flip = cfg.INPUT.JITTER, cfg.INPUT.RANDOM_FLIP
    if not 0 < jitter.MIN_SCALE <= jitter.MAX_SCALE:
        raise ValueError(
            "INPUT.JITTER.MIN_SCALE and MAX_SCALE must satisfy 0 < MIN_SCALE <= MAX_SCALE, got "
            f"{jitter.MIN_SCALE} and {jitter.MAX_SCALE}"
        )
    if jitter.CROP_SIZE < 1:
        raise ValueError(f"INPUT.JITTER.CROP_SIZE must be >= 1, got {jitter.CROP_SIZE}")
    if flip not in ("horizontal", "vertical", "none"):
        raise ValueError(
            f"INPUT.RANDOM_FLIP must be 'horizontal', 'vertical' or 'none', got {flip!r}"
        )
    if cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "INPUT.CROP.ENABLED must be False with INPUT.JITTER, which crops already, got True"
        )
    if not 0 <= jitter.COLOR < 1:
        raise ValueError(f"INPUT.JITTER.COLOR must be in [0, 1), got {jitter.COLOR}")
    size = jitter.CROP_SIZE
    augmentations = [
        T.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, target_height=size, target_width=size),
        T.FixedSizeCrop((size, size)),
    ]
    if jitter.COLOR > 0:
        factors = (1 - jitter.COLOR, 1 + jitter.COLOR)
        augmentations += [
            T.RandomBrightness(*factors),
            T.RandomContrast(*factors),
            T.RandomSaturation(*factors),
        ]
    if flip != "none":
        augmentations.append(
            T.RandomFlip(prob=0.5, horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    return augmentations


class DetectionMapper(DatasetMapper):
    """detectron2's mapper, which looks at an image before it decodes it and names it in errors.

    detectron2's transforms keep the type of a box, so that they would cut the scaled coordinates of
    integer boxes down to integers: here boxes are floats. And they are cut off at the border of
    the image, as detectron2 does after the transforms, when there may be padding beyond the border.
    """

    @configurable
    def __init__(self, *args: Any, max_pixels: int, min_visible: float = 0.0, **kwargs: Any):
        """Take the arguments of detectron2's mapper and those of this one.

        Args:
            args, kwargs: of detectron2's mapper.
            max_pixels: ``INPUT.MAX_PIXELS``.
            min_visible: ``INPUT.JITTER.MIN_VISIBLE``.

        Raises:
            ValueError: if ``min_visible`` is not in [0, 1].
        """
        super().__init__(*args, **kwargs)
        if not 0 <= min_visible <= 1:
            raise ValueError(f"INPUT.JITTER.MIN_VISIBLE must be in [0, 1], got {min_visible}")
        self.max_pixels = max_pixels
        self.min_visible = min_visible

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        jitter = cfg.INPUT.JITTER
        return {
            **super().from_config(cfg, is_train),
            "max_pixels": cfg.INPUT.MAX_PIXELS,
            "min_visible": jitter.MIN_VISIBLE if jitter.ENABLED and is_train else 0.0,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map a record, which is left as it is.

        Raises:
            ImageError: if the image is missing, truncated, broken, too large, of more than 8 bits,
                or of another size than the record says.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        path = dataset_dict["file_name"]
        image = read_image(path, self.max_pixels, self.image_format)
        height, width = image.shape[:2]
        size = dataset_dict.setdefault("height", height), dataset_dict.setdefault("width", width)
        check_size(path, image, size)
        sem_seg = None
        if "sem_seg_file_name" in dataset_dict:
            sem_seg = read_image(dataset_dict.pop("sem_seg_file_name"), self.max_pixels, "L")
            sem_seg = sem_seg.squeeze(2)
        inputs = _Inputs(image, sem_seg=sem_seg)
        transforms = self.augmentations(inputs)
        image_shape = inputs.image.shape[:2]
        dataset_dict["image"] = _as_tensor(inputs.image)
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict

    def _transform_annotations(
        self,
        dataset_dict: dict[str, Any],
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        annotations = dataset_dict["annotations"] = [
            _box_in_image(annotation, dataset_dict)
            for annotation in dataset_dict["annotations"]
            # detectron2's own loading drops those whose masks cannot be used.
            if "segmentation" in annotation or not self.use_instance_mask
        ]
        if self.min_visible > 0:
            boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
            height, width = image_shape
            _, shares = boxes_in_tile(transforms.apply_box(boxes), Tile(0, 0, width, height))
            annotations = dataset_dict["annotations"] = [
                annotation
                for annotation, share in zip(annotations, shares, strict=True)
                if share >= self.min_visible
            ]
        if any(annotation.get("iscrowd", 0) == 0 for annotation in annotations):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # detectron2 leaves out masks and keypoints where there is no annotation that has them.
        del dataset_dict["annotations"]
        instances = detection_utils.annotations_to_instances([], image_shape)
        if self.use_instance_mask and self.instance_mask_format == "polygon":
            instances.gt_masks = PolygonMasks([])
        elif self.use_instance_mask:
            instances.gt_masks = BitMasks(torch.empty(0, *image_shape))
        if self.use_keypoint:
            number = len(self.keypoint_hflip_indices or ())
            instances.gt_keypoints = Keypoints(torch.empty(0, number, 3))
        dataset_dict["instances"] = instances


class _Inputs(T.AugInput):
    """What augmentations transform, which keeps at least one pixel of height and of width.

    detectron2 rounds the shorter side of a long thin image to 0 when it resizes or crops it.
    """

    def transform(self, tfm: T.Transform) -> None:
        if isinstance(tfm, T.ResizeTransform):
            tfm.new_h, tfm.new_w = max(tfm.new_h, 1), max(tfm.new_w, 1)
        elif isinstance(tfm, T.CropTransform):
            height, width = self.image.shape[:2]
            tfm.h, tfm.w = max(tfm.h, 1), max(tfm.w, 1)
            tfm.y0, tfm.x0 = min(tfm.y0, height - 1), min(tfm.x0, width - 1)
        super().transform(tfm)


def _as_tensor(image: np.ndarray) -> torch.Tensor:
    # As in detectron2, tensors: worker processes share them with the training process.
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def model_input(image: np.ndarray, augmentations: T.Augmentation) -> dict[str, Any]:
    """Prepare an image that was read already as a mapper prepares the image of a file.

    Args:
        image: (H, W, C) uint8, in the mapper's ``image_format``.
        augmentations: the mapper's.

    Returns:
        dict: "image", a (C, H', W') tensor, and "height" and "width", those of the given image.
    """
    inputs = _Inputs(image)
    augmentations(inputs)
    height, width = image.shape[:2]
    return {"image": _as_tensor(inputs.image), "height": height, "width": width}


def _box_in_image(annotation: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return an annotation with a box of floats as XYXY_ABS, none of it outside the image."""
    box = [float(value) for value in annotation["bbox"]]
    box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
    limits = [float(record[side]) for side in ("width", "height")] * 2
    box = [min(max(value, 0.0), limit) for value, limit in zip(box, limits, strict=True)]
    return {**annotation, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def build_train_mapper(cfg: CfgNode) -> DetectionMapper:
    """Build the training mapper, with jitter and crop if ``INPUT.JITTER.ENABLED``.

    Returns:
        DetectionMapper: maps a dataset dict to one with "image", a (3, H, W) uint8 tensor in
        ``INPUT.FORMAT`` order, H and W being ``CROP_SIZE`` with jitter, and "instances", without
        those outside of the crop.

    Raises:
        ValueError: as :func:`jitter_and_crop_augmentations`.
    """
    mark_read("INPUT.JITTER.*")
    options = {}
    if cfg.INPUT.JITTER.ENABLED:
        options["augmentations"] = jitter_and_crop_augmentations(cfg, is_train=True)
        # A mask that was cut has a tighter box than the clipped one.
        options["recompute_boxes"] = cfg.MODEL.MASK_ON
    return DetectionMapper(cfg, is_train=True, **options)


def build_test_mapper(cfg: CfgNode) -> DetectionMapper:
    """Build the mapper for evaluation, which resizes as detectron2's and drops annotations."""
    return DetectionMapper(cfg, is_train=False)
