"""Names of keypoints, which a flipped image exchanges."""

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from sasa_det.config import get_cfg
from sasa_det.data import DetectionMapper, register_coco
from sasa_det.data.coco import load_coco
from sasa_det.data.keypoints import keypoint_metadata, keypoint_names

NAMES = ["nose", "left_eye", "right_eye", "Left Ear", "Right Ear", "leftmost"]


@pytest.mark.parametrize(
    "category, expected",
    [
        ({"keypoints": ["a", "b"]}, ("a", "b")),
        ({}, ()),
        ({"keypoints": None}, ()),
        ({"keypoints": "ab"}, ()),
        ({"keypoints": ["a", 1]}, ()),
        ({"keypoints": ["a", "a"]}, ()),
    ],
)
def test_names_are_those_of_the_category(category, expected):
    assert keypoint_names(category) == expected


def test_sides_make_pairs():
    expected = [("left_eye", "right_eye"), ("Left Ear", "Right Ear")]
    assert keypoint_metadata([(), NAMES, NAMES]) == {
        "keypoint_names": NAMES,
        "keypoint_flip_map": expected,
    }
    assert keypoint_metadata([["RIGHT", "LEFT"]])["keypoint_flip_map"] == [("RIGHT", "LEFT")]
    assert keypoint_metadata([(), ()]) == keypoint_metadata([("a",), ("b",)]) == {}


@pytest.mark.parametrize("check", [True, False], ids=["checked", "in another process"])
def test_a_flip_exchanges_left_and_right(check, tmp_path, unregister):
    unregister.append("pose")
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(tmp_path / "a.png")
    points = [(x, x // 2, 2) for x in (4, 1, 6, 2, 7, 3)]  # x, y, labelled and visible
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 7], "area": 63}
    annotation |= {"iscrowd": 0, "num_keypoints": 6, "keypoints": list(np.ravel(points).tolist())}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 10}],
        "annotations": [annotation],
        "categories": [{"id": 3, "name": "person", "keypoints": NAMES}],
    }
    (tmp_path / "pose.json").write_text(json.dumps(content))
    register_coco("pose", tmp_path / "pose.json", tmp_path, check=check)
    if not check:
        assert MetadataCatalog.get("pose").get("keypoint_names") is None
    (record,) = load_coco(str(tmp_path / "pose.json"), str(tmp_path), "pose")
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", True, "DATASETS.TRAIN", ("pose",)])
    flip = T.RandomFlip(prob=1.0)
    instances = DetectionMapper(cfg, augmentations=[flip])(record)["instances"]
    found = instances.gt_keypoints.tensor[0].tolist()
    # Mirrored at the middle of 10 pixels; what is left in the image is right of the nose now.
    order = [0, 2, 1, 4, 3, 5]
    assert found == [[10 - (points[i][0] + 0.5), points[i][1] + 0.5, 2] for i in order]
