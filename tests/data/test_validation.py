"""Every problem of a COCO json is found, and what passes is what detectron2 can load."""

import contextlib
import copy
import io
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det.config import add_sasa_config
from sasa_det.data import build_train_mapper, problems, validate_coco, write_digits


def changed(section, index=0, **values):
    """Return an edit of content; the value `...` removes a key."""

    def edit(content):
        entry = content[section][index]
        for key, value in values.items():
            entry.pop(key, None)
            if value is not ...:
                entry[key] = value

    return edit


def added(section, **values):
    def edit(content):
        content[section].append({**content[section][0], **values})

    return edit


def box(*numbers):
    return changed("annotations", bbox=list(numbers))


def mask(value):
    return changed("annotations", segmentation=value)


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
RLE = {"size": [4, 6], "counts": [1, 2, 21]}


@pytest.mark.parametrize(
    "edit, kind, ids",
    [
        (added("images", file_name="sub/b.png"), "REPEATED_ID", (7, None)),
        (added("annotations"), "REPEATED_ID", (7, 11)),
        (added("categories", name="dog"), "REPEATED_ID", (None, None)),
        (changed("images", 1, id="3"), "WRONG_VALUE", (None, None)),
        (changed("images", 1, id=HUGE), "WRONG_VALUE", (None, None)),
        (changed("images", 1, height=0), "WRONG_VALUE", (3, None)),
        (changed("images", 1, width=-6), "WRONG_VALUE", (3, None)),
        (changed("images", 1, width="6"), "WRONG_VALUE", (3, None)),
        (changed("images", 1, width=6.5), "WRONG_VALUE", (3, None)),
        (changed("images", 1, file_name=5), "WRONG_VALUE", (3, None)),
        (changed("images", 1, file_name=""), "WRONG_VALUE", (3, None)),
        (changed("images", 1, file_name="x" * 5000), "WRONG_VALUE", (3, None)),
        (changed("annotations", id=None), "WRONG_VALUE", (7, None)),
        (changed("annotations", id=True), "WRONG_VALUE", (7, None)),
        (changed("annotations", id=11.0), "WRONG_VALUE", (7, None)),
        (changed("annotations", id=[11]), "WRONG_VALUE", (7, None)),
        (changed("annotations", image_id=7.0), "WRONG_VALUE", (None, 11)),
        (changed("annotations", category_id={}), "WRONG_VALUE", (7, 11)),
        (changed("categories", name=None), "WRONG_VALUE", (None, None)),
        (changed("annotations", image_id=8), "UNKNOWN_REFERENCE", (None, 11)),
        (changed("annotations", category_id=6), "UNKNOWN_REFERENCE", (7, 11)),
        (changed("annotations", bbox=None), "BAD_BOX", (7, 11)),
        (changed("annotations", bbox={"x": 1}), "BAD_BOX", (7, 11)),
        (box(), "BAD_BOX", (7, 11)),
        (box(1, 1, 2), "BAD_BOX", (7, 11)),
        (box(1, 1, 2, "2"), "BAD_BOX", (7, 11)),
        (box(1, 1, 2, True), "BAD_BOX", (7, 11)),
        (box(1, 1, 2, [2]), "BAD_BOX", (7, 11)),
        (box(1, 1, NAN, 2), "INFINITE_BOX", (7, 11)),
        (box(-INF, 1, 2, 2), "INFINITE_BOX", (7, 11)),
        (box(1, 1, 2, HUGE), "INFINITE_BOX", (7, 11)),
        (box(3, 1, -2, 2), "NEGATIVE_BOX", (7, 11)),
        (box(3, 1, 2, -0.1), "NEGATIVE_BOX", (7, 11)),
        (box(3, 1, 0, 2), "EMPTY_BOX", (7, 11)),
        (box(3, 1, 2, 0.0), "EMPTY_BOX", (7, 11)),
        (box(6, 1, 2, 2), "OUTSIDE_BOX", (7, 11)),
        (box(1, -2, 2, 2), "OUTSIDE_BOX", (7, 11)),
        (box(-0.6, 1, 2, 2), "PARTLY_OUTSIDE_BOX", (7, 11)),
        (box(1, 1, 2, 3.6), "PARTLY_OUTSIDE_BOX", (7, 11)),
        (changed("annotations", iscrowd="0"), "BAD_CROWD", (7, 11)),
        (changed("annotations", iscrowd=2), "BAD_CROWD", (7, 11)),
        (changed("annotations", iscrowd=None), "BAD_CROWD", (7, 11)),
        (changed("annotations", iscrowd=True), "BAD_CROWD", (7, 11)),
        (changed("annotations", ignore=1), "IGNORED", (7, 11)),
        (changed("annotations", area=...), "MISSING_FOR_AP", (7, 11)),
        (changed("annotations", iscrowd=...), "MISSING_FOR_AP", (7, 11)),
        (changed("annotations", area=NAN), "BAD_AREA", (7, 11)),
        (changed("annotations", area=-1), "BAD_AREA", (7, 11)),
        (changed("annotations", area="4"), "BAD_AREA", (7, 11)),
        (changed("annotations", id=0), "ID_ZERO", (7, 0)),
        (mask("abc"), "BAD_MASK", (7, 11)),
        (mask([1, 2, 3, 4, 5, 6]), "BAD_MASK", (7, 11)),
        (mask([[1, 2, 3, 4, 5, "6"]]), "BAD_MASK", (7, 11)),
        (mask([[1, 2, 3, 4, 5, NAN]]), "BAD_MASK", (7, 11)),
        (mask([[1, 2, 3, 4, 5.0, HUGE]]), "BAD_MASK", (7, 11)),
        (mask({"size": [4, 6]}), "BAD_MASK", (7, 11)),
        (mask({"size": [6, 4], "counts": "1"}), "BAD_MASK", (7, 11)),
        (mask({"size": [4, 6], "counts": [1, 2]}), "BAD_MASK", (7, 11)),
        (mask({"size": [4, 6], "counts": [-1, 25]}), "BAD_MASK", (7, 11)),
        (mask([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]), "BAD_POLYGON", (7, 11)),
        (added("categories", id=1), "REPEATED_NAME", (None, None)),
        (added("images", id=1), "REPEATED_FILE", (1, None)),
        (changed("annotations", iscrowd=1), "NOTHING_TO_TRAIN_ON", (None, None)),
    ],
)
def test_problem_is_found_by_its_kind_and_ids(write, content, edit, kind, ids):
    kind = getattr(problems, kind)
    common = {problems.UNUSED_CLASS}
    assert set(validate_coco(*write(content)).counts) == common
    edit(content)
    report = validate_coco(*write(content))
    # A broken id or category makes others: boxes of a class, references to it.
    assert kind in report.counts
    (problem,) = report.examples(kind)
    assert (problem.image_id, problem.annotation_id) == ids
    assert problem.message.isprintable() and len(problem.message) < 300
    if kind.training is None:
        assert report.severity(kind) == kind.severity
    else:
        used, unused = report.for_use(kind.training), report.for_use(not kind.training)
        assert report.severity(kind) == "warning"
        assert used.severity(kind) == kind.severity and unused.severity(kind) is None


@pytest.mark.parametrize(
    "edit",
    [
        box(-0.5, -0.4, 6.9, 4.8),
        box(0, 0, 6, 4),
        box(1.5, 1, 2, 1e-3),
        changed("annotations", area=0),
        changed("annotations", ignore=0),
        mask([]),
        mask(None),
        mask([[1, 1, 3, 1, 3, 3.5]]),
        mask(RLE),
        mask({"size": [4, 6], "counts": "some compressed string"}),
        changed("images", file_name="./a.png"),
        changed("images", file_name="sub/../a.png"),
    ],
)
def test_what_is_no_problem(write, content, edit):
    edit(content)
    assert set(validate_coco(*write(content)).counts) == {problems.UNUSED_CLASS}


def test_masks_must_be_there_where_they_are_used(write, content):
    assert problems.MISSING_MASK in validate_coco(*write(content), mask_format="polygon").counts
    content["annotations"][0]["segmentation"] = RLE
    rle = validate_coco(*write(content), mask_format="polygon")
    assert rle.for_use(True).severity(problems.MASK_NOT_POLYGON) == "error"
    assert problems.MASK_NOT_POLYGON in rle.counts
    bitmask = validate_coco(*write(content), mask_format="bitmask")
    assert set(bitmask.counts) == {problems.UNUSED_CLASS}


def test_counts_classes_and_histogram(write, content):
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 12},
        {**first, "id": 13, "category_id": 9, "iscrowd": 1},
    ]
    report = validate_coco(*write(content))
    assert (report.num_images, report.num_annotations, report.num_crowds) == (2, 3, 1)
    assert report.num_unannotated == 1
    assert report.categories == ((5, "ant", 2), (9, "cup", 0))


def test_all_problems_are_kept_or_the_first_ones_and_all_are_counted(write, content):
    first = content["annotations"][0]
    content["annotations"] = [{**first, "id": i, "bbox": [0, 0, 0, 1]} for i in range(1, 31)]
    everything, few = (validate_coco(*write(content), limit=limit) for limit in (None, 3))
    assert everything.counts == few.counts and everything.counts[problems.EMPTY_BOX] == 30
    ids = [problem.annotation_id for problem in everything.examples(problems.EMPTY_BOX)]
    assert ids == list(range(1, 31))
    assert len(few.examples(problems.EMPTY_BOX)) == 3


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        (" ", "is not JSON: Expecting value"),
        ("\0\0", "is not JSON"),
        ('{"images": [', "is not JSON"),
        ("\ufeff{}", "is not JSON: Unexpected UTF-8 BOM"),
        (b"\xff\xfe{}", "is not JSON: 'utf-8' codec"),
        (DEEP, "nested too deeply"),
        ('{"images": ' + DEEP + "}", "nested too deeply"),
        ("1" * 5000, "is not JSON: Exceeds the limit"),
        ("null", "must hold a JSON object .*, not null"),
        ("true", "must hold a JSON object .*, not true"),
        ("NaN", "must hold a JSON object .*, not a float"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' must be a list, not a d"),
        (
            '{"images": [], "annotations": 7, "categories": []}',
            "'annotations' must be .* not an int",
        ),
        ('{"images": [], "categories": []}', "lacks 'annotations'; .* no AP be computed"),
    ],
)
def test_file_that_is_not_coco_is_one_error(write, tmp_path, text, message):
    json_file, root = write("")
    json_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    report = validate_coco(json_file, root)
    (problem,) = report.problems
    assert problem.kind == problems.NOT_COCO and report.kinds("error") == [problems.NOT_COCO]
    assert re.search(message, problem.message)
    assert len(problem.message) < 200


JUNK = [None, True, 0, -1, 2.5, NAN, INF, HUGE, "", "x", "\0", "\ud800", "\x1b[2J", [], [[]], {}]
JUNK += [[None], [1, 2, 3, 4], {"a": 1}, ["x"] * 4, [[1, 2, 3, 4, 5, 6]], {"counts": [], "size": 5}]


def put(content, place, value):
    """Return a copy of content with a value at a place."""
    content = copy.deepcopy(content)
    *above, last = place
    entry = content
    for step in above:
        entry = entry[step]
    entry[last] = value
    return content


def train_on(json_file, root):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (4,)
    mapper = build_train_mapper(cfg)
    for record in load_coco_json(str(json_file), str(root), "junk"):
        assert torch.isfinite(mapper(record)["instances"].gt_boxes.tensor).all()
    MetadataCatalog.remove("junk")


def evaluate_on(json_file):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        keys = ("image_id", "category_id", "bbox")
        found = [{key: a[key] for key in keys} | {"score": 1.0} for a in truth.anns.values()]
        if found:
            evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()


def test_no_content_breaks_the_check_and_what_passes_works(write, content):
    """Whatever is put anywhere: what has no errors can be loaded, mapped and evaluated on."""
    content["annotations"][0]["segmentation"] = [[1, 1, 3, 1, 3, 3]]
    content["annotations"].append({**content["annotations"][0], "id": 12})
    places = [(section,) for section in content]
    places += [(section, 0) for section in content]
    places += [(section, 0, key) for section in content for key in content[section][0]]
    places += [("annotations", 0, "ignore"), ("annotations", 0, "bbox", 2)]
    passed = {True: 0, False: 0}
    for place, junk in itertools.product(places, JUNK):
        json_file, root = write(put(content, place, junk))
        report = validate_coco(json_file, root)
        assert all(problem.message.isprintable() for problem in report.problems), (place, junk)
        for training in (True, False):
            if not report.for_use(training).count("error"):
                train_on(json_file, root) if training else evaluate_on(json_file)
                passed[training] += 1
    assert 15 < passed[False] < passed[True] < 100


def test_pixels_are_decoded_on_request(tmp_path, capsys):
    root = write_digits(tmp_path / "set", num_train=6, num_val=1, image_size=64)
    content = json.loads((root / "train.json").read_text())
    files = [root / "train" / image["file_name"] for image in content["images"]]
    files[1].write_bytes(files[1].read_bytes()[:2000])
    files[2].write_bytes(b"no image")
    Image.fromarray(np.zeros((64, 50, 3), np.uint8)).save(files[3])
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(files[4])
    os.remove(files[5])
    arguments = (root / "train.json", root / "train")
    without = validate_coco(*arguments)
    assert without.kinds("error") == [problems.MISSING_FILE]
    report = validate_coco(*arguments, pixels=True)
    errors = [p for p in report.problems if p.kind.severity == "error"]
    found = {problem.image_id: problem.message for problem in errors}
    assert set(found) == {2, 3, 4, 5, 6}
    for image_id, message in (
        (2, "cannot be read: image file is truncated"),
        (3, "is no image"),
        (4, "has 50 x 64 pixels, but its annotations are for 64 x 64"),
        (5, "has pixels of more than 8 bits"),
        (6, "does not exist"),
    ):
        assert message in found[image_id] and str(files[image_id - 1]) in found[image_id]
    assert "5/5" in capsys.readouterr().err
