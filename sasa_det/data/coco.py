"""Data sets in COCO's json format: checked before training, and registered with detectron2."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools.mask import frPyObjects

from ..errors import DatasetError
from .catalog import are_same_classes, is_registered, metadata_of, root_hint, shortened
from .coco_entries import (
    BAD_MASK,
    MISSING_FILE,
    NO_POLYGON,
    UNUSED_KEYPOINTS,
    UNUSED_MASK,
    numbers_problem,
)
from .coco_masks import mask_problem, usable_polygons
from .keypoints import keypoint_metadata, keypoint_names
from .sources import reading_of
from .validation import CocoReport, check_exists, validate_coco
from .validation_report import summarize_warnings

logger = logging.getLogger(__name__)

# Problems of a kind that are kept, as examples.
_KEPT = 10


def check_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    training: bool | None = None,
    **options: Any,
) -> CocoReport:
    """Check that a COCO json file and its images can be trained or evaluated on.

    Args:
        json_file, image_root, training, options: as of :func:`validate_coco`.

    Raises:
        FileNotFoundError: if the json file, the folder or an image is missing.
        DatasetError: if the json file cannot be used; the message names it, its first problem and
            how many more there are.
    """
    report = validate_coco(json_file, image_root, training=training, limit=_KEPT, **options)
    _refuse_errors(report)
    return report


def register_coco(
    name: str,
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    check: bool = True,
    **options: Any,
) -> None:
    """Check a COCO json data set and register it with detectron2, its classes included.

    Args:
        name: the name for ``cfg.DATASETS``.
        json_file, image_root, options: as of :func:`check_coco`.
        check: False in the other processes of a job, after one has checked the files: they
            are not read then, and the classes are known as soon as detectron2 loads them.

    Raises:
        FileNotFoundError, DatasetError: as :func:`check_coco`; also if the name stands for other
            files. Registering the same files under the same name again is harmless.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if is_registered(name, json_file=json_file, image_root=image_root):
        return
    report = _check_once(json_file, image_root, **options) if check else None
    DatasetCatalog.register(name, partial(load_coco, json_file, image_root, name))
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    if report is not None:
        # It is set when the data are loaded as well; here it is known before.
        metadata.thing_classes = list(report.class_names)
        metadata.set(**keypoint_metadata([category.keypoints for category in report.categories]))


def check_read(json_file: str) -> None:
    """Raise DatasetError if something of converted annotations could not be read.

    Args:
        json_file: a name that :func:`sasa_det.data.sources.open_data` returned.
    """
    reading = reading_of(json_file)
    errors = [p for p in reading.problems if p.kind.severity == "error"] if reading else []
    if errors:
        rest = f" (and {len(errors) - 1:,} more errors)" if len(errors) > 1 else ""
        raise DatasetError(f"{json_file}: {errors[0].message}{rest}")


def check_registered(names: Sequence[str], training: bool, **options: Any) -> None:
    """Check registered data sets before they are used, and log the warnings about them.

    Files are looked for where the metadata has ``json_file`` and ``image_root``; those that are
    evaluated with COCO's metrics go through :func:`check_coco` as well, once in a process, which
    takes seconds for COCO: one process of a job is enough.

    Args:
        names: as in ``cfg.DATASETS``.
        training: whether they are for training, not for evaluation.
        **options: as of :func:`check_coco`.

    Raises:
        DatasetError: as :func:`check_coco`, or if a name is not registered or the classes in the
            file are not those in the metadata.
        FileNotFoundError: if a file is missing; the message says where it was looked for.
    """
    for name in names:
        metadata = metadata_of(name)
        json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
        if json_file is None or image_root is None:
            continue
        try:
            if metadata.get("evaluator_type") != "coco":
                check_exists(json_file, image_root)
                continue
            report = _check_once(json_file, image_root, training, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"dataset {name!r}: {error} (looked in {os.path.abspath(json_file)} and "
                f"{os.path.abspath(image_root)}; {root_hint()})"
            ) from error
        _check_loading(name, report)
        classes = metadata.get("thing_classes")
        if classes is not None and not are_same_classes(classes, report.class_names):
            raise DatasetError(
                f"{json_file}: its categories ({shortened(report.class_names)}) are not the "
                f"classes that dataset {name!r} is registered with ({shortened(classes)})"
            )
        for sentence in summarize_warnings(report):
            logger.warning(sentence)


def _check_loading(name: str, report: CocoReport) -> None:
    """Refuse what ``load_coco`` leaves alone where detectron2's ``load_coco_json`` is called."""
    if getattr(DatasetCatalog[name], "func", None) is load_coco:
        return
    kinds = [kind for kind in (UNUSED_MASK, UNUSED_KEYPOINTS) if kind in report.counts]
    dropped = report.counts.get(NO_POLYGON, 0)
    if report.training and dropped and dropped == report.num_annotations - report.num_crowds:
        kinds.append(NO_POLYGON)
    if kinds:
        first = report.examples(kinds[0])[0]
        raise DatasetError(
            f"{report.json_file}: {first.message}, which detectron2's load_coco_json cannot leave "
            f"alone: register dataset {name!r} with sasa_det.data.register_coco"
        )


def _check_once(
    json_file: str, image_root: str, training: bool | None = None, **options: Any
) -> CocoReport:
    """As :func:`check_coco`, but without reading again what this process found free of errors."""
    check_exists(json_file, image_root)
    stat = os.stat(PathManager.get_local_path(json_file))
    places = os.path.abspath(json_file), os.path.abspath(image_root)
    state = (*places, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    report = _check_state(state, json_file, image_root, **options).for_use(training)
    _refuse_errors(report)
    return report


@cache
def _check_state(state: tuple, *args: Any, **options: Any) -> CocoReport:
    return check_coco(*args, **options)


def _refuse_errors(report: CocoReport) -> None:
    kinds = report.kinds("error")
    if kinds == [MISSING_FILE]:
        raise FileNotFoundError(
            f"{report.json_file}: {report.counts[MISSING_FILE]} of {report.num_images} image files "
            f"are missing, the first is that of {report.examples(MISSING_FILE)[0].message}"
        )
    if kinds:
        first = next(problem for problem in report.problems if problem.kind in kinds)
        more = report.count("error") - 1
        rest = f" (and {more:,} more errors, which sasa-det validate-data lists)" if more else ""
        raise DatasetError(f"{report.json_file}: {first.message}{rest}")


def read_coco(json_file: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a COCO json that has been checked."""
    with open(PathManager.get_local_path(os.fspath(json_file)), encoding="utf-8") as file:
        return json.load(file)


def box_corners(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the boxes of annotations or results of COCO as corners, (N, 4) X0, Y0, X1, Y1."""
    boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    return BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def load_coco(json_file: str, image_root: str, dataset_name: str) -> list[dict[str, Any]]:
    """Load a COCO json file that has been checked, and set the classes in the metadata.

    The arguments and records are those of detectron2's ``load_coco_json``, but an annotation whose
    mask or keypoints cannot be used is kept without them. detectron2 drops it, or fails, even where
    boxes alone are trained.
    """
    content = read_coco(json_file)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = {category["id"]: index for index, category in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=classes,
        **keypoint_metadata([keypoint_names(category) for category in categories]),
    )
    annotations = defaultdict(list)
    for entry in content["annotations"]:
        annotations[entry["image_id"]].append(entry)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [
                _annotation(entry, (image["height"], image["width"]), classes)
                for entry in annotations[image["id"]]
            ],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _annotation(
    entry: dict[str, Any], size: tuple[int, int], classes: dict[int, int]
) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("iscrowd", "bbox") if key in entry}
    kept |= {"category_id": classes[entry["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
    if mask := _mask(entry.get("segmentation"), size):
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
    if problem and problem[0] == BAD_MASK:
        return None
    if isinstance(segmentation, list):
        return usable_polygons(segmentation)
    if isinstance(segmentation["counts"], list):
        return frPyObjects(segmentation, *size)
    return segmentation
