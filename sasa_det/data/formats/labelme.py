"""Annotations of labelme: a json file of shapes beside each image."""

import json
import math
import os
from typing import Any

from ...errors import DatasetError
from ...utils.files import require_folder
from .. import coco_entries as problems
from ..coco_entries import shown
from ..media import IMAGE_SUFFIXES
from .builder import CocoBuilder, Converted, classes_of, number, read_text
from .files import files_in, progress


def read_labelme(folder: str) -> Converted:
    """Read the rectangles, polygons and circles of a folder of labelme's json files.

    A polygon gives a mask and the box around it, a circle the box around it. Images without a json
    file are not annotated, and are left out. The classes are those that labels.txt or classes.txt
    in the folder or the one above lists, in its order, or all labels in alphabetical order.

    Args:
        folder: of json files at any depth.

    Raises:
        DatasetError: if there are none.
        FileNotFoundError: if the folder does not exist.
    """
    require_folder("data folder", folder)
    contents, faults = {}, {}
    for path in progress(sorted(files_in(folder, {".json"})), "Reading json files", "file"):
        try:
            contents[path] = _read(path)
        except DatasetError as error:
            faults[path] = str(error)
    if not contents and not faults:
        raise DatasetError(f"data folder {folder} has no json files of labelme")
    labels = (
        shape["label"]
        for content in contents.values()
        for shape in content["shapes"]
        if isinstance(shape, dict) and isinstance(shape.get("label"), str)
    )
    names, names_source = classes_of(folder, labels)
    builder = CocoBuilder(names, names_source, {*contents, *faults})
    used = set()
    for path, content in progress(contents.items(), "Reading sizes", "image"):
        used.add(_add(builder, path, content))
    for message in faults.values():
        builder.add_problem(problems.UNREADABLE_ANNOTATIONS, message)
        builder.num_left_out += 1
    for path in sorted(files_in(folder, IMAGE_SUFFIXES)):
        json_file = f"{os.path.splitext(path)[0]}.json"
        if path not in used and json_file not in faults:
            builder.add_problem(problems.UNUSED_IMAGE, f"image {path} has no json file")
    return builder.finish([folder])


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (RecursionError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DatasetError(f"{path} must hold the shapes of labelme")
    # The image itself, which may be in it, is not used.
    content.pop("imageData", None)
    return content


def _add(builder: CocoBuilder, path: str, content: dict[str, Any]) -> str:
    """Add an image and its objects, and return the path of the image."""
    named = content.get("imagePath")
    if not isinstance(named, str) or not named:
        builder.add_problem(
            problems.UNREADABLE_ANNOTATIONS, f"{path} has imagePath {shown(named)}, not a file name"
        )
        builder.num_left_out += 1
        return ""
    # labelme for Windows writes backslashes.
    image_path = os.path.normpath(os.path.join(os.path.dirname(path), named.replace("\\", "/")))
    size = content.get("imageWidth"), content.get("imageHeight")
    image = builder.add_image(image_path, path, size if all(size) else None)
    for index, shape in enumerate(content["shapes"] if image else ()):
        where = f"{path} shape {index + 1}"
        try:
            shape_type, polygon = _outline(shape)
        except ValueError as error:
            builder.add_problem(problems.BAD_OBJECT, f"{where} {error}")
            continue
        if not polygon:
            builder.add_problem(problems.UNUSED_SHAPE, f"{where} is a {shown(shape_type)}")
            continue
        class_index = builder.class_index(shape.get("label"), where)
        if class_index is None:
            continue
        if shape_type == "polygon":
            builder.add_polygon(image, class_index, polygon, where)
        else:
            xs, ys = polygon[::2], polygon[1::2]
            corners = min(xs), min(ys), max(xs), max(ys)
            builder.add_object(image, class_index, corners, where)
    return image_path


def _outline(shape: object) -> tuple[object, list[float]]:
    """Return the type of a shape and x0, y0, x1, y1 and so on of what it is tight around."""
    if not isinstance(shape, dict):
        raise ValueError(f"is {shown(shape)}, not a shape")
    shape_type, points = shape.get("shape_type", "polygon"), shape.get("points")
    least = {"rectangle": 2, "polygon": 3, "circle": 2}.get(shape_type)
    if least is None:
        return shape_type, []
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise ValueError(f"has points {shown(points)}; they must be a list of x and y")
    if len(points) < least:
        raise ValueError(f"is a {shape_type} of {len(points)} points; it needs {least}")
    numbers = [number(value) for point in points for value in point]
    if shape_type == "circle":
        x, y, *on_circle = numbers[:4]
        radius = math.dist((x, y), on_circle)
        return shape_type, [x - radius, y - radius, x + radius, y + radius]
    return shape_type, numbers
