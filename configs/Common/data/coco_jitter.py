"""COCO with multiscale jitter and crops of 640 x 640, and horizontal flips (appendix A.3)."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from .coco import dataloader

mapper = dataloader.train.mapper
mapper.use_instance_mask = False
mapper.augmentations = [
    L(T.ResizeScale)(min_scale=0.8, max_scale=1.2, target_height=640, target_width=640),
    L(T.FixedSizeCrop)(crop_size=[640, 640]),
    L(T.RandomFlip)(prob=0.5, horizontal=True, vertical=False),
]
# Crops of the same size need no grouping by aspect ratio.
dataloader.train.aspect_ratio_grouping = False
resize = dataloader.test.mapper.augmentations[0]
resize.short_edge_length = resize.max_size = 640
