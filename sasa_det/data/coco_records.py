"""The records of a COCO json file, in detectron2's format."""

import json
import os
from collections import defaultdict
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools.mask import frPyObjects

from . import coco_entries as problems
from .coco_entries import numbers_problem
from .coco_masks import mask_problem, usable_polygons


def load_coco(json_file: str, image_root: str, dataset_name: str) -> list[dict[str, Any]]:
    """Load a COCO json file that has been checked, and set the classes in the metadata.

    The records are those of detectron2's ``load_coco_json``, but an annotation whose mask or
    keypoints cannot be used is kept without them. detectron2 drops it, or fails, even where boxes
    alone are trained.

    Args:
        json_file: COCO instances json; anything that detectron2's PathManager reads.
        image_root: the folder that the images' ``file_name`` is relative to.
        dataset_name: whose metadata get the classes.

    Returns:
        list: a record for each image, in the order of the images' ids.
    """
    with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
        content = json.load(file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = {category["id"]: index for index, category in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=classes,
    )
    annotations = defaultdict(list)
    for entry in content["annotations"]:
        annotations[entry["image_id"]].append(entry)
    records = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        size = image["height"], image["width"]
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": size[0],
                "width": size[1],
                "image_id": image["id"],
                "annotations": [
                    _annotation(entry, size, classes) for entry in annotations[image["id"]]
                ],
            }
        )
    return records


def _annotation(
    entry: dict[str, Any], size: tuple[int, int], classes: dict[int, int]
) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("iscrowd", "bbox") if key in entry}
    kept |= {"category_id": classes[entry["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
    mask = _mask(entry.get("segmentation"), size)
    if mask:
        kept["segmentation"] = mask
    keypoints = entry.get("keypoints")
    if keypoints and numbers_problem(keypoints) is None:
        # From indices of pixels to their centers, as detectron2 has them.
        kept["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in enumerate(keypoints)]
    return kept


def _mask(segmentation: object, size: tuple[int, int]) -> object:
    """Return a segmentation as detectron2 keeps it, or None where there is no usable one."""
    if not segmentation:
        return None
    problem = mask_problem(segmentation, size)
    if problem and problem[0] == problems.BAD_MASK:
        return None
    if isinstance(segmentation, list):
        return usable_polygons(segmentation)
    if isinstance(segmentation["counts"], list):
        return frPyObjects(segmentation, *size)
    return segmentation
