"""Data sets of Ultralytics YOLO: a data.yaml, images, and a text file of objects for each."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from ...errors import DatasetError
from ...utils.files import require_file
from .. import coco_entries as problems
from ..coco_entries import described, shown
from ..media import IMAGE_SUFFIXES
from .builder import CocoBuilder, Converted, ImageEntry, number, read_text, split_hint
from .files import files_in, progress

# The keys of a data.yaml that name images.
_SPLITS = ("train", "val", "test")

# Fractions are rounded: what they may exceed 0 and 1 by.
_TOLERANCE = 1e-3


class _Listed(NamedTuple):
    """An image, and the list that names it, "" if it was found in its folder."""

    path: str
    listed_in: str = ""


def yolo_splits(yaml_file: str) -> list[str]:
    """Return the names of the splits that a data.yaml has images of."""
    content = _read_yaml(yaml_file)
    return [split for split in _SPLITS if content.get(split)]


def read_yolo(yaml_file: str, split: str) -> Converted:
    """Read a split of a YOLO data set of boxes or polygons.

    The label file of ``images/a.jpg`` is ``labels/a.txt``: the last folder called images in its
    path is exchanged, or else it lies beside the image. A line is a class index with the center,
    width and height of a box, or with the corners of a polygon, in fractions of the image's width
    and height. A polygon gives a mask and the box around it.

    Args:
        yaml_file: a data.yaml with ``names`` (list or dict), and images of ``train``, ``val`` and
            ``test``: folders or text files that list images, one or several, relative to ``path``,
            which is relative to the file.
        split: a key of it.

    Raises:
        DatasetError: if the file cannot be used, or does not have the split.
        FileNotFoundError: if the file or a folder of the split does not exist.
    """
    content = _read_yaml(yaml_file)
    names = _class_names(yaml_file, content)
    if not content.get(split) or split not in _SPLITS:
        raise DatasetError(
            f"{yaml_file} has no split {split!r}; {split_hint(yolo_splits(yaml_file))}"
        )
    num_keypoint_numbers = _num_keypoint_numbers(yaml_file, content)
    builder = CocoBuilder(names, f"the names in {yaml_file}", {yaml_file})
    folders, listed = _find_images(yaml_file, content, split)
    label_files = set()
    for path, listed_in in progress(listed, f"Reading {split}", "image"):
        image = builder.add_image(path, listed_in)
        label_file = label_path(path)
        label_files.add(label_file)
        if image is not None:
            _add_objects(builder, image, path, label_file, num_keypoint_numbers)
    builder.sources |= label_files
    for label_file in _unused(label_files, folders):
        builder.add_problem(problems.UNUSED_ANNOTATIONS, f"{label_file} has no image")
    return builder.finish(folders)


def label_path(image_path: str) -> str:
    """Return where the label file of an image is."""
    images, labels = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"
    before, found, after = image_path.rpartition(images)
    path = f"{before}{labels}{after}" if found else image_path
    return os.path.splitext(path)[0] + ".txt"


def _read_yaml(yaml_file: str) -> dict[str, Any]:
    require_file("data file", yaml_file)
    try:
        content = yaml.safe_load(read_text(yaml_file))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or type(error).__name__
        raise DatasetError(f"{yaml_file}{where} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise DatasetError(
            f"{yaml_file} must hold the keys of a YOLO data.yaml (path, train, val, names), not "
            f"{described(content)}"
        )
    return content


def _class_names(yaml_file: str, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DatasetError(
                f"{yaml_file}: the keys of names must be the class indices 0 to "
                f"{len(names) - 1}, got {shown(list(names))}"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{yaml_file}: names must be a list of class names, or a dict of them by class index, "
            f"got {shown(names)}"
        )
    # YAML reads the names 1 and yes as other things than text.
    return [str(name) for name in names]


def _num_keypoint_numbers(yaml_file: str, content: dict[str, Any]) -> int:
    """Return how many numbers of keypoints follow each box of a data set of poses."""
    shape = content.get("kpt_shape", [0, 0])
    if not isinstance(shape, list) or [type(value) for value in shape] != [int, int]:
        raise DatasetError(f"{yaml_file}: kpt_shape must be two integers, got {shown(shape)}")
    return shape[0] * shape[1]


def _find_images(
    yaml_file: str, content: dict[str, Any], split: str
) -> tuple[list[str], list[_Listed]]:
    """Return the folders of the images of a split, and the images."""
    root = _root(yaml_file, content)
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    folders, found = [], []
    for entry in entries:
        if not isinstance(entry, str):
            raise DatasetError(
                f"{yaml_file}: {split} must name a folder or a text file of images, or a list of "
                f"these, got {shown(entry)}"
            )
        path = _located(root, entry)
        if os.path.isdir(path):
            folders.append(path)
            images = sorted(files_in(path, IMAGE_SUFFIXES, follow_links=True))
            if not images:
                raise DatasetError(f"{yaml_file}: {split} folder {path} has no images")
            found += map(_Listed, images)
        elif os.path.isfile(path):
            found += _in_list(path, root)
        else:
            raise FileNotFoundError(
                f"{yaml_file}: {split} {entry!r} does not exist (looked for {path})"
            )
    return folders, found


def _root(yaml_file: str, content: dict[str, Any]) -> str:
    folder = os.path.dirname(os.path.abspath(yaml_file))
    path = content.get("path") or "."
    if not isinstance(path, str):
        raise DatasetError(f"{yaml_file}: path must be a folder, got {shown(path)}")
    beside = os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
    # Ultralytics looks in the working directory.
    return beside if os.path.isdir(beside) else os.path.abspath(os.path.expanduser(path))


def _located(root: str, entry: str) -> str:
    path = os.path.normpath(os.path.join(root, os.path.expanduser(entry)))
    if not os.path.exists(path) and entry.startswith("../"):
        # Roboflow writes ../train/images into the file beside train/.
        inside = os.path.normpath(os.path.join(root, entry.removeprefix("../")))
        return inside if os.path.exists(inside) else path
    return path


def _in_list(list_file: str, root: str) -> Iterator[_Listed]:
    folder = os.path.dirname(list_file)
    for index, line in enumerate(read_text(list_file).splitlines()):
        if name := line.strip():
            beside, inside = (os.path.normpath(os.path.join(at, name)) for at in (folder, root))
            path = inside if os.path.exists(inside) and not os.path.exists(beside) else beside
            yield _Listed(path, f"{list_file} line {index + 1}")


def _add_objects(
    builder: CocoBuilder, image: ImageEntry, path: str, label_file: str, num_keypoint_numbers: int
) -> None:
    if not os.path.isfile(label_file):
        builder.add_problem(
            problems.MISSING_ANNOTATIONS, f"image {path} has no label file {label_file}"
        )
        return
    try:
        lines = read_text(label_file).splitlines()
    except DatasetError as error:
        builder.add_problem(problems.UNREADABLE_ANNOTATIONS, str(error))
        return
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{label_file} line {index + 1}"
        try:
            _add_line(builder, image, line.split(), where, num_keypoint_numbers)
        except ValueError as error:
            builder.add_problem(problems.BAD_OBJECT, f"{where} {error}")


def _add_line(
    builder: CocoBuilder, image: ImageEntry, words: list[str], where: str, num_keypoint_numbers: int
) -> None:
    numbers = [number(word) for word in words]
    index, fractions = numbers[0], numbers[1:]
    if num_keypoint_numbers:
        if len(fractions) != 4 + num_keypoint_numbers:
            raise ValueError(
                f"has {len(numbers)} numbers; it must have the class index, 4 of a box and "
                f"{num_keypoint_numbers} of keypoints"
            )
        fractions = fractions[:4]
    if len(fractions) != 4 and (len(fractions) < 6 or len(fractions) % 2):
        raise ValueError(
            f"has {len(numbers)} numbers; it must have the class index and 4 of a box (x, y, "
            "width, height) or 6 or more of a polygon (x, y, ...)"
        )
    if index != int(index) or not 0 <= index < len(builder.class_names):
        builder.add_problem(
            problems.UNKNOWN_CLASS,
            f"{where} has the class index {words[0]}; it must be one of 0 to "
            f"{len(builder.class_names) - 1}, for {builder.names_source}",
        )
        return
    for value in fractions:
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            raise ValueError(
                f"has {value:g}; it must be a fraction of the image's width or height, from 0 to 1"
            )
    if len(fractions) == 4:
        x, y, width, height = fractions
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        scale = (image.width, image.height) * 2
        corners = [value * size for value, size in zip(corners, scale, strict=True)]
        builder.add_object(image, int(index), corners, where)
    else:
        scale = (image.width, image.height) * (len(fractions) // 2)
        polygon = [value * size for value, size in zip(fractions, scale, strict=True)]
        builder.add_polygon(image, int(index), polygon, where)


def _unused(label_files: set[str], folders: list[str]) -> Iterator[str]:
    """Yield label files in the folders' label folders that belong to no image."""
    for folder in folders:
        # As if it were an image in the folder.
        labels = os.path.dirname(label_path(os.path.join(folder, "x")))
        if labels == folder or not os.path.isdir(labels):
            continue
        for place, _, files in sorted(os.walk(labels)):
            for name in sorted(files):
                path = os.path.join(place, name)
                if name.endswith(".txt") and name != "classes.txt" and path not in label_files:
                    yield path
