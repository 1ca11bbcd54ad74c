"""What detections on a data set got right and wrong, in numbers."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..data.coco import read_coco
from ..errors import UsageError

# COCO's: the thresholds of IoU are 0.5, 0.55 and so on, the sizes by area of an object in pixels.
SIZES = ("all", "small", "medium", "large")
_AP50, _AP75 = 0, 5
_FEW, _MORE, _MOST = range(3)  # 1, 10 and max_detections of an image and class

BACKGROUND = "background"

# The names of TIDE's errors, in the order of the paper, and hotcoco's.
ERRORS = {
    "class": "Cls",
    "location": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}

_FIELDS = ("image_id", "category_id", "bbox", "score")


class Detections(NamedTuple):
    """Detections beside the objects of their data set.

    Attributes:
        truth: content of the COCO json.
        results: dicts with "image_id", "category_id", "bbox" (X0, Y0, width, height) and "score".
    """

    truth: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Return the categories by id, as they are numbered in the results."""
        return sorted(self.truth["categories"], key=lambda category: category["id"])


def read_detections(predictions: str | os.PathLike, json_file: str | os.PathLike) -> Detections:
    """Read COCO results of boxes, and the json of the data set that they are of.

    Args:
        predictions: as ``coco_instances_results.json`` of an evaluation.
        json_file: COCO instances json, which was checked.

    Raises:
        UsageError: if the results cannot be read, or are not of this data set.
    """
    truth = read_coco(json_file)
    try:
        results = json.loads(Path(predictions).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"predictions {predictions} cannot be read: {error.strerror}.") from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"predictions {predictions} are not json: {error}.") from error
    if not isinstance(results, list):
        raise UsageError(
            f"predictions {predictions} must be a list of COCO results, as evaluation writes into "
            f"coco_instances_results.json, got a {type(results).__name__}."
        )
    known = {
        "image_id": {image["id"] for image in truth["images"]},
        "category_id": {category["id"] for category in truth["categories"]},
    }
    for index, result in enumerate(results):
        if problem := _problem(result, known):
            raise UsageError(f"predictions {predictions}: result {index} {problem} of {json_file}.")
    return Detections(truth, results)


def _problem(result: Any, known: Mapping[str, set[int]]) -> str | None:
    """Say what is wrong with a result, as a clause before "of" the json file."""
    if not isinstance(result, dict) or not all(key in result for key in _FIELDS):
        return f"must be a dict with {', '.join(_FIELDS)}, to be compared with the objects"
    for key, ids in known.items():
        if type(result[key]) is not int or result[key] not in ids:
            return f"has the {key} {result[key]!r}, which is none"
    box = result["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"has the bbox {box!r}, not X0, Y0, width and height, on an image"
    if not _is_number(result["score"]):
        return f"has the score {result['score']!r}, which is not a number, on an image"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def analyze_results(
    detections: Detections,
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> dict[str, Any]:
    """Compute what COCO's evaluation, a confusion matrix and TIDE say about detections.

    hotcoco computes them; AP and AR are those of pycocotools. They are percentages, and None where
    there is no object to find.

    Args:
        detections: to analyze.
        score_threshold: detections with a lower score are left out of the confusion matrix and of
            the errors by image, for which a detector would not report them.
        iou_threshold: IoU from which on a detection can be that of an object, in the confusion
            matrix, the errors by image and TIDE.
        max_detections: how many detections of a class are counted in an image, those with the
            highest scores; COCO counts 100.

    Returns:
        dict: that json can hold, with

        - "metrics": AP, AP50, AP75, AR1, AR10 and AR (of ``max_detections``), for all classes and
          sizes;
        - "by_size": AP, AP50 and AR for "small", "medium" and "large";
        - "by_class": for the name of each class AP, AP50, AP75, AP by size ("APs", "APm", "APl"),
          AR, ARs, ARm, ARl, and its number of objects and of detections;
        - "precision_recall": precision at each of the 101 values of "recall", by IoU threshold, as
          the mean over classes, and "by_class" at IoU 0.50;
        - "confusion": "matrix" with a row for each true and a column for each detected class, and
          the background as the last of both; "classes", their names;
        - "errors": TIDE's types by name, each with "count" and "AP50", what its removal would add
          to AP50; "false_positives" and "false_negatives" likewise, without counts;
        - "images": of each image with an object or a detection its id, "file_name", "f1" and the
          numbers of "correct", "wrong" (detections) and "missed" (objects), the worst first.

    Raises:
        UsageError: if hotcoco is not installed.
    """
    hotcoco = _hotcoco()
    evaluation = _evaluate(hotcoco, detections, max_detections)
    evaluation.accumulate()
    precision = _known(evaluation.eval["precision"])
    recall = _known(evaluation.eval["recall"])
    numbers = _Numbers(precision, recall)
    names = [category["name"] for category in detections.categories]
    tide = evaluation.tide_errors(pos_thr=iou_threshold)
    # Those on crowds are neither right nor wrong.
    counted = evaluation.image_diagnostics(iou_thr=0.5)["dt_status"]
    reported = Detections(
        detections.truth,
        [
            result
            for number, result in enumerate(detections.results, start=1)
            if result["score"] >= score_threshold and number in counted
        ],
    )
    shown = _evaluate(hotcoco, reported, max_detections)
    matrix = shown.confusion_matrix(iou_thr=iou_threshold)["matrix"]
    return {
        "num_images": len(detections.truth["images"]),
        "num_detections": len(detections.results),
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
        "max_detections": max_detections,
        "metrics": numbers.summary(),
        "by_size": {size: numbers.of_size(i) for i, size in enumerate(SIZES) if i},
        "by_class": _by_class(detections, numbers),
        "precision_recall": _curves(precision, names),
        "confusion": {"classes": [*names, BACKGROUND], "matrix": matrix.tolist()},
        "errors": _errors(tide),
        "images": _images(detections, shown.image_diagnostics(iou_thr=iou_threshold)),
    }


def _hotcoco() -> ModuleType:
    try:
        import hotcoco
    except ImportError as error:
        raise UsageError(
            f"the analysis of results needs hotcoco, which cannot be imported ({error}): "
            "install it with pip install hotcoco."
        ) from error
    return hotcoco


def _evaluate(hotcoco: ModuleType, detections: Detections, max_detections: int) -> Any:
    truth = hotcoco.COCO(detections.truth)
    # Boxes alone: the area of a result with a mask would be the mask's.
    boxes = [{key: result[key] for key in _FIELDS} for result in detections.results]
    evaluation = hotcoco.COCOeval(truth, truth.load_res(boxes), "bbox")
    evaluation.params.max_dets = [1, 10, max_detections]
    evaluation.evaluate()
    return evaluation


def _known(values: np.ndarray) -> np.ndarray:
    """Return values with NaN for -1, where there is no object."""
    return np.where(values > -1, values, np.nan)


def _percent(values: np.ndarray) -> float | None:
    """Return the mean of what is known in percent; None if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean() * 100) if known.size else None


class _Numbers:
    """Means of precision and recall over parts of COCO's arrays."""

    def __init__(self, precision: np.ndarray, recall: np.ndarray):
        """
        Args:
            precision: by IoU, recall, class, size and number of detections.
            recall: by IoU, class, size and number of detections.
        """
        self._precision, self._recall = precision, recall

    def summary(self) -> dict[str, float | None]:
        every = self._precision[..., 0, _MOST]
        recalls = {"AR1": _FEW, "AR10": _MORE, "AR": _MOST}
        return {
            "AP": _percent(every),
            "AP50": _percent(every[_AP50]),
            "AP75": _percent(every[_AP75]),
            **{name: _percent(self._recall[..., 0, i]) for name, i in recalls.items()},
        }

    def of_size(self, size: int) -> dict[str, float | None]:
        precision = self._precision[..., size, _MOST]
        return {
            "AP": _percent(precision),
            "AP50": _percent(precision[_AP50]),
            "AR": _percent(self._recall[..., size, _MOST]),
        }

    def of_class(self, index: int) -> dict[str, float | None]:
        precision, recall = self._precision[:, :, index], self._recall[:, index]
        sizes = {f"{size[0]}": i for i, size in enumerate(SIZES) if i}
        return {
            "AP": _percent(precision[..., 0, _MOST]),
            "AP50": _percent(precision[_AP50, :, 0, _MOST]),
            "AP75": _percent(precision[_AP75, :, 0, _MOST]),
            **{f"AP{name}": _percent(precision[..., i, _MOST]) for name, i in sizes.items()},
            "AR": _percent(recall[..., 0, _MOST]),
            **{f"AR{name}": _percent(recall[..., i, _MOST]) for name, i in sizes.items()},
        }


def _by_class(detections: Detections, numbers: _Numbers) -> dict[str, dict[str, Any]]:
    objects = [
        entry["category_id"]
        for entry in detections.truth["annotations"]
        if not entry.get("iscrowd", 0)
    ]
    found = [result["category_id"] for result in detections.results]
    return {
        category["name"]: {
            **numbers.of_class(index),
            "num_objects": objects.count(category["id"]),
            "num_detections": found.count(category["id"]),
        }
        for index, category in enumerate(detections.categories)
    }


def _curves(precision: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    curves = precision[..., 0, _MOST]
    has_objects = ~np.isnan(curves).all((0, 1))
    mean = curves[:, :, has_objects].mean(2) if has_objects.any() else None
    return {
        "recall": np.linspace(0, 1, curves.shape[1]).round(2).tolist(),
        "by_iou": {}
        if mean is None
        else {f"{0.5 + 0.05 * i:.2f}": curve.tolist() for i, curve in enumerate(mean)},
        "by_class": {
            name: curves[_AP50, :, index].tolist()
            for index, name in enumerate(names)
            if has_objects[index]
        },
    }


def _errors(tide: Mapping[str, Any]) -> dict[str, Any]:
    gains = {name: 100 * gain for name, gain in tide["delta_ap"].items()}
    return {
        "AP50": 100 * tide["ap_base"],
        "types": {
            name: {"count": tide["counts"][key], "AP50": gains[key]} for name, key in ERRORS.items()
        },
        "false_positives": {"AP50": gains["FP"]},
        "false_negatives": {"AP50": gains["FN"]},
    }


def _images(detections: Detections, diagnostics: Mapping[str, Any]) -> list[dict[str, Any]]:
    summaries = diagnostics["img_summary"]
    rows = [
        {
            "id": image["id"],
            "file_name": image["file_name"],
            "f1": summary["f1"],
            "correct": summary["tp"],
            "wrong": summary["fp"],
            "missed": summary["fn"],
        }
        for image in detections.truth["images"]
        if (summary := summaries.get(image["id"])) and summary["tp"] + summary["fp"] + summary["fn"]
    ]
    return sorted(rows, key=lambda row: (row["f1"], -row["wrong"] - row["missed"], row["id"]))
