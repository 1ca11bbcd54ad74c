"""Whatever a json holds: what the check accepts, training and evaluation accept as well."""

import contextlib
import copy
import io
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sasa_det.config import add_sasa_config
from sasa_det.config.options import RunOptions
from sasa_det.data import build_train_mapper, check_registered, register_coco, validate_coco
from sasa_det.evaluation.coco import coco_evaluator

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
POINTS = [1, 1, 2, 3, 2, 1, 0, 0, 0]
RLE = {"size": [4, 6], "counts": [1, 2, 21]}


def thing(identity, image_id, category_id, bbox, segmentation, iscrowd=0):
    return {
        "id": identity,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": iscrowd,
        "segmentation": segmentation,
        "keypoints": POINTS,
        "num_keypoints": 2,
    }


NAMES = {7: "a.png", 3: "b.png", 4: "c.png"}
CONTENT = {
    "images": [
        {"id": identity, "file_name": name, "height": 4, "width": 6}
        for identity, name in NAMES.items()
    ],
    "annotations": [
        thing(11, 7, 5, [1, 1, 2, 2], [[1, 1, 3, 1, 3, 3], [1, 1, 3, 1, 3, 3.5, 1, 3]]),
        thing(12, 7, 9, [0.5, 0, 3, 2.5], [[1, 1, 3, 1, 3, 3]]),
        thing(13, 3, 5, [1, 1, 2, 2], [[0, 0, 3, 0, 3, 3]]),
        thing(14, 3, 5, [1, 1, 2, 2], RLE, iscrowd=1),
    ],
    "categories": [{"id": 9, "name": "cup"}, {"id": 5, "name": "ant"}],
}
SECTIONS = {"images": 3, "annotations": 4, "categories": 2}
KEYS = {key: list(CONTENT[key][0]) for key in SECTIONS}
KEYS["annotations"] += ["ignore", "bbox_mode"]

NUMBERS = [0, 1, 2, 3, -1, 2.5, -0.0, 1e-7, 1e-320, 1e9, 1e18, 1e29, 1e299, -1e299]
NUMBERS += [2**31, 2**63 - 1, -(2**63), 10**20, NAN, INF, HUGE]
OTHERS = [None, True, False, "", "x", "\0", "\ud800", "\x1b[2J", "12e0", [], {}, [None], {"a": 1}]
BOXES = [[1, 2, 3, 4], ["x"] * 4, [6, 1, 2, 2], [1e8] * 4, [0, 0, 1e29, 1e29], [-1e29, 0, 2e29, 2]]
BOXES += [[1, 1, 1e-9, 1], [1, 1, 10**20, 2], [1, 1, 2**63, 2], [0.5, 0.5, 1e-320, 1]]
POLYGONS = [[[1, 2, 3, 4, 5, 6]], [[]], [[], []], [[1, 2, 3, 4]], [[1, 2, 3, 4], POINTS[:6]]]
POLYGONS += [[POINTS[:6], []], [POINTS[:6], [1]], [[1e6, 1, 3, 1, 3, 3]], [[1e12, 1, 3, 1, 3, 3]]]
POLYGONS += [[[-30, 1, 30, 1, 3, 30]], [[1] * 6], [[9, 9, 12, 9, 12, 12]], [[1e28] * 6]]
COUNTS = [[1, 2, 21], "12e0", "", "0", "h0", "b'12e0'", "1" * 400, [24], [0, 24], [0, 0, 0, 24]]
COUNTS += [[24.0], [1, 2], [-1, 25], None, 5]
MASKS = [{"size": [4, 6], "counts": counts} for counts in COUNTS] + [{**RLE, "size": [6, 4]}]
KEYPOINTS = [POINTS, [1, 2, 2], [1, 2, 2] * 3, [1e299] * 9, ["a"] * 9, [None] * 9, [1, 2, 3] * 3]
KEYPOINTS += [[0] * 9, [0, 0, 1] * 3]
VALUES = [*NUMBERS, *OTHERS, *BOXES, *POLYGONS, *MASKS, *KEYPOINTS]
LIKELY = {"bbox": BOXES, "segmentation": [*POLYGONS, *MASKS], "keypoints": KEYPOINTS}
DELETED = object()


def values_of(key):
    values = st.sampled_from([*VALUES, DELETED])
    return st.one_of(values, st.sampled_from(LIKELY[key])) if key in LIKELY else values


@st.composite
def contents(draw):
    """A json's content with a few values anywhere in it, and sometimes one in all annotations."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(0, 3))):
        section = draw(st.sampled_from([*SECTIONS, "annotations", "annotations"]))
        key = draw(st.sampled_from(KEYS[section]))
        value = draw(values_of(key))
        one = draw(st.integers(0, SECTIONS[section] - 1))
        in_all = section == "annotations" and key != "id" and draw(st.integers(0, 3)) == 0
        for entry in content[section] if in_all else [content[section][one]]:
            entry.pop(key, None)
            if value is not DELETED:
                entry[key] = copy.deepcopy(value)
    for section, length in SECTIONS.items():
        if draw(st.integers(0, 9)) == 0:
            content[section] = content[section][: draw(st.integers(0, length))]
        if content[section] and draw(st.integers(0, 19)) == 0:
            content[section][0] = draw(st.sampled_from(VALUES))
        if draw(st.integers(0, 39)) == 0:
            content[section] = draw(st.sampled_from(VALUES))
    return content


def config(task):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (8,)
    cfg.MODEL.MASK_ON = task in ("polygon", "bitmask")
    cfg.INPUT.MASK_FORMAT = task if cfg.MODEL.MASK_ON else "polygon"
    cfg.MODEL.KEYPOINT_ON = task == "keypoints"
    if task == "keypoints":
        cfg.DATASETS.TRAIN = ("any",)
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 3
    cfg.INPUT.JITTER.ENABLED = task == "jitter"
    cfg.INPUT.JITTER.CROP_SIZE = 8
    return cfg


def train(cfg):
    """Map all records, and make the targets of masks and keypoints as the heads do."""
    min_keypoints = 1 if cfg.MODEL.KEYPOINT_ON else 0
    records = get_detection_dataset_dicts(["any"], min_keypoints=min_keypoints)
    mapper, found = build_train_mapper(cfg), 0
    for record in records:
        instances = mapper(record)["instances"]
        boxes = instances.gt_boxes.tensor
        assert torch.isfinite(boxes).all()
        if len(instances) and cfg.MODEL.MASK_ON:
            instances.gt_masks.crop_and_resize(boxes, 28)
        if len(instances) and cfg.MODEL.KEYPOINT_ON:
            instances.gt_keypoints.to_heatmap(boxes, 56)
        found += len(instances)
    assert found or cfg.INPUT.JITTER.ENABLED


def evaluate(cfg, content):
    evaluator = coco_evaluator("any", kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    evaluator.reset()
    for image in content["images"]:
        size = image["height"], image["width"]
        if size[0] * size[1] > 10**6:  # of which no mask is made here
            continue
        found = Instances(size)
        found.pred_boxes = Boxes(torch.tensor([[1.0, 1, 3, 3], [0, 0, 6, 4]]))
        found.scores = torch.tensor([0.9, 0.5])
        found.pred_classes = torch.tensor([0, len(content["categories"]) - 1])
        if cfg.MODEL.MASK_ON:
            found.pred_masks = torch.ones(2, *size, dtype=torch.bool)
        if cfg.MODEL.KEYPOINT_ON:
            found.pred_keypoints = torch.ones(2, 3, 3)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for name in NAMES.values():
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / name)
    logging.disable(logging.WARNING)
    yield folder
    logging.disable(logging.NOTSET)


def forget():
    DatasetCatalog.pop("any", None)
    MetadataCatalog.pop("any", None)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["boxes", "jitter", "polygon", "bitmask", "keypoints"])
def test_what_the_check_accepts_training_and_evaluation_accept(task, folder):
    cfg = config(task)
    accepted = {True: 0, False: 0}

    @given(contents())
    @settings(max_examples=250, derandomize=True, deadline=None, database=None)
    def check(content):
        json_file = folder / "any.json"
        json_file.write_text(json.dumps(content))
        options = RunOptions.read(cfg).image_options()
        report = validate_coco(json_file, folder, **options, pixels=True)
        assert all(problem.message.isprintable() for problem in report.problems)
        for training in (True, False):
            if report.is_accepted(training):
                accepted[training] += 1
                forget()
                register_coco("any", json_file, folder, **options)
                flips = {"keypoint_names": list("abc"), "keypoint_flip_map": [("a", "b")]}
                MetadataCatalog.get("any").set(**flips)
                check_registered(["any"], training, **options)
                train(cfg) if training else evaluate(cfg, content)

    try:
        check()
    finally:
        forget()
    # Neither all nor nothing.
    assert all(15 < number < 235 for number in accepted.values()), accepted
