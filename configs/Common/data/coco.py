"""COCO with detectron2's augmentation: resizing to one of several sizes, and horizontal flips."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T

from sasa_det.data import DetectionMapper
from sasa_det.data.images import MAX_PIXELS
from sasa_det.data.loader import detection_train_loader
from sasa_det.evaluation.coco import coco_evaluator

# The maximum number of detections in an image, of a RetinaNet or of the heads of an R-CNN.
_DETECTIONS = (
    "${oc.select:model.max_detections_per_image,"
    "${oc.select:model.roi_heads.box_predictor.test_topk_per_image,100}}"
)

dataloader = dict(
    # COCO-format json file and image folder, instead of the names below.
    train_json="",
    train_images="",
    test_json="",
    test_images="",
    train=L(detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=True),
        mapper=L(DetectionMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=[640, 672, 704, 736, 768, 800],
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(prob=0.5, horizontal=True, vertical=False),
            ],
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format="polygon",
            recompute_boxes=False,
            max_pixels=MAX_PIXELS,
        ),
        total_batch_size=16,
        num_workers=4,
        sampler="TrainingSampler",
        aspect_ratio_grouping=True,
        max_unreadable=0,
        max_unreadable_fraction=0.0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DetectionMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=800, max_size=1333, sample_style="choice"
                ),
            ],
            image_format="${...train.mapper.image_format}",
            max_pixels="${...train.mapper.max_pixels}",
        ),
        num_workers="${..train.num_workers}",
    ),
    # It is called for each of the datasets, if there are several.
    evaluator=L(coco_evaluator)(
        dataset_name="${..test.dataset.names}", max_dets_per_image=_DETECTIONS
    ),
)
