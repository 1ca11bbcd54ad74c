"""Every problem of a COCO json is found, and what passes is what detectron2 can load."""

import itertools
import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.mask import encode

from sasa_det.data import coco_entries as problems
from sasa_det.data import validate_coco, write_digits
from sasa_det.data.coco_masks import run_lengths


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
        (changed("categories", name="\ud800"), "WRONG_VALUE", (None, None)),
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
        (box(3, 1, 2, 1e-6), "EMPTY_BOX", (7, 11)),
        (box(5.999999, 1, 2, 2), "OUTSIDE_BOX", (7, 11)),
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
        (changed("annotations", id=-1), "NEGATIVE_ID", (7, -1)),
        (mask("abc"), "UNUSED_MASK", (7, 11)),
        (mask([1, 2, 3, 4]), "UNUSED_MASK", (7, 11)),
        (mask([[]]), "NO_POLYGON", (7, 11)),
        (mask([[1, 2, 3, 4]]), "NO_POLYGON", (7, 11)),
        (mask([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]), "BAD_POLYGON", (7, 11)),
        (changed("annotations", keypoints=["nose", "eye"]), "UNUSED_KEYPOINTS", (7, 11)),
        (changed("annotations", keypoints=[None, None, 2]), "UNUSED_KEYPOINTS", (7, 11)),
        (changed("annotations", keypoints=[[1, 2, 2]]), "UNUSED_KEYPOINTS", (7, 11)),
        (changed("annotations", keypoints={"nose": 1}), "UNUSED_KEYPOINTS", (7, 11)),
        (box(0.1, 0.25, 0.5, 0.5), "FRACTION_BOX", (7, 11)),
        (box(1, 2, 6, 4), "CORNER_BOX", (7, 11)),
        (changed("annotations", bbox_mode=0), "BOX_MODE", (7, 11)),
        (added("annotations", id=12), "DUPLICATE", (7, 12)),
        (changed("annotations", area=0), "ZERO_AREA", (7, 11)),
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
        changed("annotations", ignore=0),
        changed("annotations", keypoints=[1, 2, 2, 0, 0, 0]),
        mask([]),
        mask(None),
        mask([[1, 1, 3, 1, 3, 3.5]]),
        mask(RLE),
        mask({"size": [4, 6], "counts": "12e0"}),
        changed("images", file_name="./a.png"),
        changed("images", file_name="sub/../a.png"),
    ],
)
def test_what_is_no_problem(write, content, edit):
    edit(content)
    assert set(validate_coco(*write(content)).counts) == {problems.UNUSED_CLASS}


def compressed(mask):
    return {"size": [4, 6], "counts": encode(np.asfortranarray(mask))["counts"].decode()}


FULL = compressed(np.ones((4, 6), np.uint8))


@pytest.mark.parametrize(
    "segmentation, kind, message",
    [
        (None, "MISSING_MASK", "use_instance_mask (MODEL.MASK_ON) needs"),
        ([], "MISSING_MASK", "use_instance_mask (MODEL.MASK_ON) needs"),
        ("abc", "BAD_MASK", "has segmentation 'abc'; it must be polygons"),
        ([1, 2, 3, 4, 5, 6], "BAD_MASK", "has a polygon 1; it must be a list of numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "BAD_MASK", "it must be a list of numbers"),
        ([[1, 2, 3, 4, 5, NAN]], "BAD_MASK", "float32 cannot hold"),
        ([[1, 2, 3, 4, 5.0, HUGE]], "BAD_MASK", "float32 cannot hold"),
        # pycocotools would keep billions of points along its edges.
        ([[1, 2, 3, 4, 5, 1e9]], "BAD_MASK", "beyond 10 times the image's size"),
        ([[1, 2, 3, 4]], "NO_POLYGON", "a polygon of 4 numbers"),
        ([[]], "NO_POLYGON", "a polygon of 0 numbers"),
        ([[7, 1, 9, 1, 9, 3]], "EMPTY_MASK", "without a pixel in the image"),
        ([[1, 1, 3, 1, 2, 1]], "EMPTY_MASK", "without a pixel in the image"),
        ({"size": [4, 6], "counts": [24]}, "EMPTY_MASK", "without a pixel"),
        ([[1, 2, 3, 4, 5, 6], []], "BAD_POLYGON", "a polygon of 0 numbers"),
        ({"size": [4, 6]}, "BAD_MASK", "counts are neither a string nor integers"),
        ({"size": [4, 6], "counts": [1.0, 23.0]}, "BAD_MASK", "neither a string nor integers"),
        ({"size": [4, 6], "counts": [1, 2]}, "BAD_MASK", "sum to 3, not to its 24 pixels"),
        ({"size": [4, 6], "counts": [-1, 25]}, "BAD_MASK", "with run lengths below 0"),
        ({"size": [6, 4], "counts": FULL["counts"]}, "BAD_MASK", "of size [6, 4] for an image"),
        ({"size": [4, 5], "counts": FULL["counts"]}, "BAD_MASK", "of size [4, 5] for an image"),
        ({"size": [4], "counts": FULL["counts"]}, "BAD_MASK", "without 'size'"),
        ({"size": [4, 6], "counts": ""}, "BAD_MASK", "sum to 0, not to its 24 pixels"),
        ({"size": [4, 6], "counts": "1"}, "BAD_MASK", "sum to 1, not to its 24 pixels"),
        ({"size": [4, 6], "counts": "h0O"}, "BAD_MASK", "with run lengths below 0"),
        # The second character says that a third follows; an unbounded run of such is as bad.
        ({"size": [4, 6], "counts": "1h"}, "BAD_MASK", "not pycocotools' compressed ones"),
        ({"size": [4, 6], "counts": "h" * 40 + "0"}, "BAD_MASK", "not pycocotools'"),
        ({"size": [4, 6], "counts": "1\0"}, "BAD_MASK", "not pycocotools' compressed ones"),
        ({"size": [4, 6], "counts": "1\u0131"}, "BAD_MASK", "not pycocotools' compressed ones"),
        ({"size": [4, 6], "counts": str(FULL["counts"].encode())}, "BAD_MASK", "a printed bytes"),
    ],
)
def test_masks_are_checked_where_they_are_used_and_left_alone_elsewhere(
    write, content, segmentation, kind, message
):
    content["annotations"][0]["segmentation"] = segmentation
    used = validate_coco(*write(content), mask_format="bitmask")
    (problem,) = used.examples(getattr(problems, kind))
    assert message in problem.message and len(problem.message) < 200
    unused = validate_coco(*write(content))
    assert unused.is_accepted(True) and unused.is_accepted(False)
    if used.kinds("error") and segmentation:
        assert unused.examples(problems.UNUSED_MASK)[0].message == problem.message


def test_masks_without_faults(write, content):
    for segmentation in (RLE, FULL, {"size": [4, 6], "counts": [0, 24]}, [[1, 1, 3, 1, 3, 3.5]]):
        content["annotations"][0]["segmentation"] = segmentation
        assert set(validate_coco(*write(content), mask_format="bitmask").counts) == {
            problems.UNUSED_CLASS
        }
    content["annotations"][0]["segmentation"] = RLE
    polygons = validate_coco(*write(content), mask_format="polygon")
    assert polygons.for_use(True).severity(problems.MASK_NOT_POLYGON) == "error"
    (problem,) = polygons.examples(problems.MASK_NOT_POLYGON)
    assert problem.message.endswith("; set instance_mask_format (INPUT.MASK_FORMAT) to bitmask")


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))
)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_run_lengths_are_those_that_were_encoded(mask):
    """Of columns, one after the other, the first of them of zeros."""
    counts = encode(np.asfortranarray(mask))["counts"].decode()
    pixels = [0, *mask.flatten("F").tolist()]
    expected = [len(list(group)) for _, group in itertools.groupby(pixels)]
    expected[0] -= 1
    assert run_lengths(counts) == expected


def test_long_runs_are_decoded():
    mask = np.zeros((3000, 40000), np.uint8, order="F")
    mask[7, 39999] = 1
    counts = encode(mask)["counts"].decode()
    assert run_lengths(counts) == [3000 * 39999 + 7, 1, 2992]


POINTS = [1, 1, 2, 3, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "values, kind, message",
    [
        ({"keypoints": None}, "BAD_KEYPOINTS", "null; it must be a list of numbers"),
        ({"keypoints": ["nose"] * 9}, "BAD_KEYPOINTS", "it must be a list of numbers"),
        ({"keypoints": POINTS[:6]}, "BAD_KEYPOINTS", "of 6 numbers; there must be"),
        ({"keypoints": [1, 1, 3, *POINTS[3:]]}, "BAD_KEYPOINTS", "of a visibility other than"),
        ({"keypoints": [NAN, *POINTS[1:]]}, "BAD_KEYPOINTS", "float32 cannot hold"),
        ({"num_keypoints": None}, "BAD_KEYPOINTS_FOR_AP", "has num_keypoints null"),
        ({"keypoints": [0] * 9}, "NOTHING_TO_TRAIN_ON", "training leaves them out"),
    ],
)
def test_keypoints_are_checked_where_they_are_used(write, content, values, kind, message):
    content["annotations"][0] |= {"keypoints": POINTS, "num_keypoints": 2}
    assert validate_coco(*write(content), num_keypoints=3).is_accepted(True)
    content["annotations"][0] |= values
    report = validate_coco(*write(content), num_keypoints=3)
    (problem,) = report.examples(getattr(problems, kind))
    assert message in problem.message
    assert not report.is_accepted(True) or not report.is_accepted(False)
    assert validate_coco(*write(content)).is_accepted(True)


@pytest.mark.parametrize("bbox", [[1, 1, 0, 2], [6, 0, 2, 2], [0, -3, 2, 3], [5.999999, 0, 2, 2]])
def test_where_nothing_remains_to_train_on_training_is_refused(write, content, bbox):
    first = content["annotations"][0]
    content["annotations"] = [{**first, "bbox": bbox}, {**first, "id": 12, "iscrowd": 1}]
    report = validate_coco(*write(content))
    assert not report.is_accepted(True) and report.is_accepted(False)
    assert problems.NOTHING_TO_TRAIN_ON in report.counts
    content["annotations"].append({**first, "id": 13})
    assert validate_coco(*write(content)).is_accepted(True)


def test_without_a_polygon_there_are_boxes_to_train_on_but_no_masks(write, content):
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    assert validate_coco(*write(content)).is_accepted(True)
    assert not validate_coco(*write(content), mask_format="polygon").is_accepted(True)


def test_without_a_pixel_there_are_polygons_to_train_on_but_no_bitmasks(write, content):
    content["annotations"][0]["segmentation"] = [[7, 1, 9, 1, 9, 3]]
    assert validate_coco(*write(content), mask_format="polygon").is_accepted(True)
    assert not validate_coco(*write(content), mask_format="bitmask").is_accepted(True)


def test_corners_are_told_from_boxes_that_are_a_little_too_large(write, content):
    first = content["annotations"][0]
    inside = [{**first, "id": i, "bbox": [1, 1, 2, 2 + i / 99]} for i in range(1, 30)]
    corners = {**first, "id": 50, "bbox": [1, 2, 6, 4]}
    content["annotations"] = [*inside, corners]
    assert problems.CORNER_BOX not in validate_coco(*write(content)).counts
    content["annotations"] = [*inside[:9], corners]
    report = validate_coco(*write(content))
    (problem,) = report.examples(problems.CORNER_BOX)
    assert problem.annotation_id == 50 and report.counts[problems.PARTLY_OUTSIDE_BOX] == 1


def test_counts_classes_and_histogram(write, content):
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 12},
        {**first, "id": 13, "category_id": 9, "iscrowd": 1},
    ]
    report = validate_coco(*write(content))
    assert (report.num_images, report.num_annotations, report.num_crowds) == (2, 3, 1)
    assert report.num_unannotated == 1
    assert report.categories == ((5, "ant", 2, ()), (9, "cup", 0, ()))


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
        (3, "is not an image"),
        (4, "has 50 x 64 pixels, but its annotations are for 64 x 64"),
        (5, "has pixels of more than 8 bits"),
        (6, "does not exist"),
    ):
        assert message in found[image_id] and str(files[image_id - 1]) in found[image_id]
    assert "5/5" in capsys.readouterr().err
