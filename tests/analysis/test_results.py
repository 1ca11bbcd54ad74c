"""The analysis of results beside pycocotools, and on cases that are counted by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det.analysis.results import ERRORS, Detections, analyze_results, read_detections
from sasa_det.errors import UsageError

BOX = [10, 10, 20, 20]
# Of IoU 12 / 28, and 19 / 21, with BOX.
NEAR, ALMOST = [18, 10, 20, 20], [11, 10, 20, 20]
FAR = [60, 60, 20, 20]


def data_set(objects, num_images=2, num_classes=3):
    """A COCO json with objects as (image, class, box) or (image, class, box, 1) for a crowd."""
    return {
        "images": [
            {"id": i, "width": 100, "height": 100, "file_name": f"{i}.png"}
            for i in range(1, num_images + 1)
        ],
        # Not in the order of the ids.
        "categories": [{"id": 10 * c, "name": f"c{c}"} for c in range(num_classes, 0, -1)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": 10 * kind,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd[0] if crowd else 0,
            }
            for number, (image, kind, box, *crowd) in enumerate(objects, start=1)
        ],
    }


def analyze(objects, found, **options):
    results = [
        {"image_id": image, "category_id": 10 * kind, "bbox": box, "score": score}
        for image, kind, box, score in found
    ]
    return analyze_results(Detections(data_set(objects), results), **options)


@pytest.fixture(scope="module")
def random_detections():
    """Objects of all sizes, crowds among them, and detections that are right, shifted and wrong."""
    rng = np.random.default_rng(0)
    objects, found = [], []
    for image in range(1, 31):
        for _ in range(rng.integers(0, 7)):
            x, y = rng.uniform(0, 400, 2)
            width, height = np.exp(rng.uniform(1.5, 5.5, 2))
            kind = int(rng.integers(1, 5))
            box = [float(value) for value in (x, y, width, height)]
            objects.append((image, kind, box, int(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                shift = rng.normal(0, 0.15, 2) * (width, height)
                box = [float(v) for v in (x + shift[0], y + shift[1], width, height)]
                kind = kind if rng.random() < 0.8 else int(rng.integers(1, 5))
                found.append((image, kind, box, float(rng.random())))
    truth = data_set(objects, num_images=30, num_classes=5)  # one class without objects
    results = [
        {"image_id": image, "category_id": 10 * kind, "bbox": box, "score": score}
        for image, kind, box, score in found
    ]
    return Detections(truth, results)


def percent(values):
    values = values[values > -1]
    return pytest.approx(100 * values.mean(), abs=1e-9) if values.size else None


def test_what_is_beyond_the_counted_detections_is_missed():
    objects = [(1, 1, [30.0 * i, 0.0, 20.0, 20.0], 0) for i in range(150)]
    found = [(image, kind, box, 1 - i / 1000) for i, (image, kind, box, _) in enumerate(objects)]
    for most, seen in ((100, 100), (120, 120), (200, 150)):
        results = analyze(objects, found, max_detections=most)
        assert results["metrics"]["AR"] == pytest.approx(100 * seen / 150)
        assert results["metrics"]["AR10"] == pytest.approx(100 * 10 / 150)
        assert results["errors"]["types"]["missed"]["count"] == 150 - seen
        (image,) = results["images"]
        assert (image["correct"], image["wrong"], image["missed"]) == (seen, 0, 150 - seen)


def test_the_numbers_are_those_of_pycocotools(random_detections):
    results = analyze_results(random_detections)
    truth = COCO()
    truth.dataset = json.loads(json.dumps(random_detections.truth))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(json.loads(json.dumps(random_detections.results)))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    summary, sizes = results["metrics"], results["by_size"]
    assert summary["AP"] == percent(precision[..., 0, 2])
    assert summary["AP50"] == percent(precision[0, ..., 0, 2])
    assert summary["AP75"] == percent(precision[5, ..., 0, 2])
    assert summary["AR1"] == percent(recall[..., 0, 0])
    assert summary["AR10"] == percent(recall[..., 0, 1])
    assert summary["AR"] == percent(recall[..., 0, 2])
    for size, name in enumerate(("small", "medium", "large"), start=1):
        assert sizes[name]["AP"] == percent(precision[..., size, 2])
        assert sizes[name]["AR"] == percent(recall[..., size, 2])
    for index in range(5):
        row = results["by_class"][f"c{index + 1}"]
        assert row["AP"] == percent(precision[:, :, index, 0, 2])
        assert row["AP50"] == percent(precision[0, :, index, 0, 2])
        assert row["AP75"] == percent(precision[5, :, index, 0, 2])
        assert row["AR"] == percent(recall[:, index, 0, 2])
        for size, letter in enumerate("sml", start=1):
            assert row[f"AP{letter}"] == percent(precision[:, :, index, size, 2])
            assert row[f"AR{letter}"] == percent(recall[:, index, size, 2])
    assert results["by_class"]["c5"]["AP"] is None
    assert "c5" not in results["precision_recall"]["by_class"]
    curves = results["precision_recall"]
    np.testing.assert_allclose(curves["by_class"]["c2"], precision[0, :, 1, 0, 2], atol=1e-12)
    mean = precision[5, :, :4, 0, 2].mean(1)
    np.testing.assert_allclose(curves["by_iou"]["0.75"], mean, atol=1e-12)
    assert results["errors"]["AP50"] == pytest.approx(summary["AP50"], abs=1e-9)
    json.dumps(results, allow_nan=False)


# One object of c1 in each image, found in the second; what is found in the first; the errors; and
# the AP50 that their removal gives back, in exact fractions of COCO's 101 places of recall.
HALF = 51 / 101
CASES = {
    "class": ([(1, 2, BOX, 0.5)], {"class": 1}, 1 - HALF),
    "location": ([(1, 1, NEAR, 0.5)], {"location": 1}, 1 - HALF),
    "both": ([(1, 2, NEAR, 0.5)], {"both": 1, "missed": 1}, 0),
    "duplicate": ([(1, 1, BOX, 0.9), (1, 1, ALMOST, 0.8)], {"duplicate": 1}, None),
    "background": ([(1, 1, FAR, 0.9)], {"background": 1, "missed": 1}, HALF / 2),
    "missed": ([], {"missed": 1}, 1 - HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_each_error_of_tide(name):
    found, counts, gain = CASES[name]
    results = analyze([(1, 1, BOX), (2, 1, BOX)], [*found, (2, 1, BOX, 0.7)])
    errors = results["errors"]["types"]
    assert list(errors) == list(ERRORS)
    assert {key: error["count"] for key, error in errors.items() if error["count"]} == counts
    if gain is None:  # the duplicate stands between the two that are right
        gain = 1 - (51 + 50 * 2 / 3) / 101
    assert errors[name]["AP50"] == pytest.approx(100 * gain, abs=1e-9)


def test_the_confusion_matrix():
    objects = [(1, 1, BOX), (1, 2, FAR), (2, 3, BOX), (2, 1, FAR), (2, 2, [80, 0, 15, 15], 1)]
    found = [
        (1, 1, BOX, 0.9),  # right
        (1, 3, FAR, 0.8),  # of another class
        (1, 1, [60, 10, 10, 10], 0.7),  # on the background
        (2, 3, NEAR, 0.9),  # beside the object, which is missed
        (2, 1, FAR, 0.4),  # below the threshold, so that the object is missed
        (2, 2, [81, 1, 10, 10], 0.9),  # in a crowd, neither right nor wrong
    ]
    confusion = analyze(objects, found, score_threshold=0.5)["confusion"]
    assert confusion["classes"] == ["c1", "c2", "c3", "background"]
    assert confusion["matrix"] == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]]


def test_the_worst_images_come_first():
    objects = [(1, 1, BOX), (1, 2, FAR), (2, 1, BOX)]
    images = analyze(objects, [(1, 1, BOX, 0.9), (2, 2, BOX, 0.9)])["images"]
    assert [image["file_name"] for image in images] == ["2.png", "1.png"]
    counts = [(image["correct"], image["wrong"], image["missed"]) for image in images]
    assert counts == [(0, 1, 1), (1, 0, 1)]
    assert [image["f1"] for image in images] == [0, pytest.approx(2 / 3)]


def test_a_model_that_finds_nothing():
    results = analyze([(1, 1, BOX)], [])
    assert results["metrics"]["AP"] == 0
    assert results["errors"]["types"]["missed"]["count"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 7}, "result 0 has the image_id 7, which is none of"),
        ({"category_id": 1}, "result 0 has the category_id 1, which is none of"),
        ({"bbox": [1, 2, 3]}, "has the bbox"),
        ({"score": float("nan")}, "has the score nan"),
        (None, "result 0 must be a dict with image_id, category_id, bbox, score"),
    ],
)
def test_results_of_other_data_are_refused(tmp_path, change, message):
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(data_set([(1, 1, BOX)])))
    result = {"image_id": 1, "category_id": 10, "bbox": BOX, "score": 0.5}
    results.write_text(json.dumps([result]))
    assert read_detections(results, truth).results == [result]
    results.write_text(json.dumps([{} if change is None else {**result, **change}]))
    with pytest.raises(UsageError, match=message):
        read_detections(results, truth)


def test_files_of_another_kind_are_refused(tmp_path):
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(data_set([(1, 1, BOX)])))
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_detections(results, truth)
    results.write_text("{")
    with pytest.raises(UsageError, match="are not json"):
        read_detections(results, truth)
    results.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="are not json"):
        read_detections(results, truth)
    results.write_text(json.dumps(data_set([])))
    with pytest.raises(UsageError, match="must be a list of COCO results, .* got a dict"):
        read_detections(results, truth)
