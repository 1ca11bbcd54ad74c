"""Multiscale jitter and crop: the training input of the paper's detectors (appendix A.3)."""

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation

__all__ = ["JitterCropMapper", "build_jitter_crop_mapper", "jitter_and_crop_augmentations"]


def jitter_and_crop_augmentations(cfg, is_train):
    """Augmentations that scale an image at random, cut a square out of it, and flip it.

    In training the image is resized, its aspect ratio kept, to the largest size that fits into a
    square of `CROP_SIZE` times a factor drawn from [`MIN_SCALE`, `MAX_SCALE`] (of
    `INPUT.JITTER`). Where it exceeds the crop a random window is taken, the same fraction of the
    room being left off on both axes; where it falls short it is padded on the right and at the
    bottom with the value 128, detectron2's default.

    Args:
        cfg (CfgNode): config with `INPUT.JITTER`, `INPUT.RANDOM_FLIP`.
        is_train (bool): False gives detectron2's usual resizing for inference.

    Returns:
        list[Augmentation]: to be applied in this order.

    Raises:
        ValueError: a config value is out of range; the message names the key.
    """
    if not is_train:
        return build_augmentation(cfg, is_train=False)
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
    size = jitter.CROP_SIZE
    augmentations = [
        T.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, target_height=size, target_width=size),
        T.FixedSizeCrop((size, size)),
    ]
    if flip != "none":
        augmentations.append(
            T.RandomFlip(prob=0.5, horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    return augmentations


class JitterCropMapper(DatasetMapper):
    """detectron2's mapper for annotations whose boxes may be integers.

    detectron2's transforms keep the type of a box, so that they would cut the scaled coordinates
    of boxes that a json file holds as integers down to integers.
    """

    def __call__(self, dataset_dict):
        if "annotations" in dataset_dict:
            annotations = [
                {**annotation, "bbox": [float(value) for value in annotation["bbox"]]}
                for annotation in dataset_dict["annotations"]
            ]
            dataset_dict = {**dataset_dict, "annotations": annotations}
        return super().__call__(dataset_dict)


def build_jitter_crop_mapper(cfg):
    """Build the training mapper that jitters and crops.

    Boxes are clipped to the crop, and instances that lie outside of it are dropped.

    Args:
        cfg (CfgNode): as for `jitter_and_crop_augmentations`.

    Returns:
        JitterCropMapper: maps a dataset dict to one with "image", a (3, CROP_SIZE, CROP_SIZE) uint8
            tensor in `INPUT.FORMAT` order, and "instances".

    Raises:
        ValueError: as `jitter_and_crop_augmentations`.
    """
    return JitterCropMapper(
        cfg,
        is_train=True,
        augmentations=jitter_and_crop_augmentations(cfg, is_train=True),
        # A mask that was cut has a tighter box than the clipped one.
        recompute_boxes=cfg.MODEL.MASK_ON,
    )
