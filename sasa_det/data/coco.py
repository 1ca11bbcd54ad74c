"""Data sets in COCO's json format: checked before training, and registered with detectron2."""

import logging
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import DatasetError
from .builtin import root_hint
from .catalog import are_same_classes, metadata_of, shortened
from .coco_entries import MISSING_FILE, NO_POLYGON, UNUSED_KEYPOINTS, UNUSED_MASK
from .coco_records import load_coco
from .validation import CocoReport, check_exists, validate_coco
from .validation_report import summarize_warnings

logger = logging.getLogger(__name__)

# Problems of a kind that are kept, as examples.
_KEPT = 10

# Reports on files without errors, so that a process reads each only once.
_known_reports: dict[tuple, CocoReport] = {}


def check_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    training: bool | None = None,
    **options: Any,
) -> CocoReport:
    """Check that a COCO json file and its images can be trained or evaluated on.

    Args:
        json_file, image_root, training: as of :func:`validate_coco`.
        **options: ``max_pixels``, ``mask_format`` and ``num_keypoints`` of the same.

    Returns:
        CocoReport: what the file holds, and warnings.

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
        json_file: COCO instances json.
        image_root: the folder of the images.
        check: False in the other processes of a job, after one has checked the files: they
            are not read then, and the classes are known as soon as detectron2 loads them.
        **options: as of :func:`check_coco`.

    Raises:
        FileNotFoundError: as :func:`check_coco`.
        DatasetError: as :func:`check_coco`, or if the name stands for other files. Registering the
            same files under the same name again is harmless.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        found = (known.get("json_file"), known.get("image_root"))
        if None in found or _real(*found) != _real(json_file, image_root):
            raise DatasetError(
                f"dataset {name!r} is already registered with json_file and image_root {found}, "
                f"not {(json_file, image_root)}: give the new data another name"
            )
        return
    report = _check_once(json_file, image_root, **options) if check else None
    DatasetCatalog.register(name, partial(load_coco, json_file, image_root, name))
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    if report is not None:
        # It is set when the data are loaded as well; here it is known before.
        metadata.thing_classes = list(report.class_names)


def check_registered(names: Sequence[str], training: bool, **options: Any) -> None:
    """Check registered data sets before they are used, and log the warnings about them.

    Files are looked for where the metadata has ``json_file`` and ``image_root``; those that are
    evaluated with COCO's metrics go through :func:`check_coco` as well. This reads the whole json
    file, which takes seconds for COCO, unless this process has done so before: one process of a job
    is enough.

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


def _real(*paths: str) -> list[str]:
    return [os.path.realpath(path) for path in paths]


def _check_once(
    json_file: str, image_root: str, training: bool | None = None, **options: Any
) -> CocoReport:
    """As :func:`check_coco`, but without reading again what this process found free of errors."""
    check_exists(json_file, image_root)
    stat = os.stat(PathManager.get_local_path(json_file))
    key = (
        *(os.path.abspath(json_file), os.path.abspath(image_root)),
        *(stat.st_ino, stat.st_size, stat.st_mtime_ns),
        *sorted(options.items()),
    )
    if key not in _known_reports:
        _known_reports[key] = check_coco(json_file, image_root, **options)
    report = _known_reports[key].for_use(training)
    _refuse_errors(report)
    return report


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
        rest = f" (and {more:,} more errors, which tools/validate_data.py lists)" if more else ""
        raise DatasetError(f"{report.json_file}: {first.message}{rest}")
