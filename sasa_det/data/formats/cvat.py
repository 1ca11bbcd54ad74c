"""Annotations of CVAT, as it exports them for images."""

import math
import os
from xml.etree.ElementTree import Element

from ...errors import DatasetError
from ...utils.files import require_file
from .. import coco_entries as problems
from .builder import CocoBuilder, Converted, ImageEntry, number, stated_size
from .files import progress
from .xml import parse_xml

_UNUSED = ("cuboid", "mask", "points", "polyline", "skeleton")


def read_cvat(xml_file: str) -> Converted:
    """Read the boxes, polygons and ellipses of an export as "CVAT for images 1.1".

    A polygon and a rotated box give a mask and the box around it, an ellipse the box around it.
    Images are looked for beside the file and in images/. The classes are the labels of the task,
    the job or the project, in its order.

    Args:
        xml_file: annotations.xml.

    Raises:
        DatasetError: if the file cannot be used.
        FileNotFoundError: if it does not exist.
    """
    require_file("data file", xml_file)
    root = parse_xml(xml_file)
    if root.tag != "annotations":
        raise DatasetError(f"{xml_file} must hold the <annotations> of CVAT, not <{root.tag}>")
    if root.find("track") is not None:
        raise DatasetError(
            f'{xml_file} has tracks of a video: export the task as "CVAT for images 1.1"'
        )
    labels = root.findall("meta/*/labels/label/name") or root.findall("meta/*/*/labels/label/name")
    names = [(label.text or "").strip() for label in labels]
    if not names:
        raise DatasetError(f"{xml_file} has no labels of a task, a job or a project in its <meta>")
    builder = CocoBuilder(names, f"the labels in {xml_file}", {xml_file})
    folder = os.path.dirname(os.path.abspath(xml_file))
    for index, entry in enumerate(progress(root.findall("image"), "Reading sizes", "image")):
        where = f"{xml_file} image {entry.get('name') or index + 1!r}"
        size = stated_size(entry.get("width", ""), entry.get("height", ""))
        image = builder.add_image(_image_path(folder, entry), where, size)
        if image is not None:
            _add_objects(builder, image, entry, where)
    return builder.finish([])


def _image_path(folder: str, entry: Element) -> str:
    name, subset = entry.get("name", ""), entry.get("subset", "")
    places = [("images", subset), ("images",), (subset,), ()]
    paths = [os.path.normpath(os.path.join(folder, *place, name)) for place in places]
    return next((path for path in paths if os.path.isfile(path)), paths[1])


def _add_objects(builder: CocoBuilder, image: ImageEntry, entry: Element, image_name: str) -> None:
    for index, shape in enumerate(entry):
        where = f"{image_name}, {shape.tag} {index + 1}"
        if shape.tag in _UNUSED:
            builder.add_problem(problems.UNUSED_SHAPE, f"{where} has no box")
            continue
        if shape.tag not in ("box", "polygon", "ellipse"):
            continue
        try:
            polygon = _outline(shape)
        except ValueError as error:
            builder.add_problem(problems.BAD_OBJECT, f"{where} {error}")
            continue
        class_index = builder.class_index(shape.get("label", ""), where)
        if class_index is None:
            continue
        if len(polygon) > 4:
            builder.add_polygon(image, class_index, polygon, where)
        else:
            builder.add_object(image, class_index, polygon, where)


def _outline(shape: Element) -> list[float]:
    """Return x0, y0, x1, y1 of a box, or the corners of a polygon."""
    if shape.tag == "polygon":
        points = [part for point in shape.get("points", "").split(";") for part in point.split(",")]
        numbers = [number(part) for part in points]
        if len(numbers) < 6 or len(numbers) % 2:
            raise ValueError("has fewer than 3 points")
        return numbers
    angle = math.radians(number(shape.get("rotation", "0")))
    if shape.tag == "ellipse":
        x, y, rx, ry = (number(shape.get(key)) for key in ("cx", "cy", "rx", "ry"))
        width = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        height = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        return [x - width, y - height, x + width, y + height]
    x0, y0, x1, y1 = (number(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
    if not angle:
        return [x0, y0, x1, y1]
    # CVAT turns clockwise around the center.
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    turned = []
    for corner_x, corner_y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)):
        dx, dy = corner_x - x, corner_y - y
        turned += [
            x + dx * math.cos(angle) - dy * math.sin(angle),
            y + dx * math.sin(angle) + dy * math.cos(angle),
        ]
    return turned
