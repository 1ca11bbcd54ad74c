"""What is wrong with a part of a COCO json file, as the kind of a problem and a clause about it."""

import reprlib

from . import problems

__all__ = [
    "ANNOTATION_FIELDS",
    "CATEGORY_FIELDS",
    "IMAGE_FIELDS",
    "area_problem",
    "box_problem",
    "crowd_problem",
    "described",
    "field_problems",
    "id_of",
    "is_file_name",
    "is_id",
    "is_name",
    "mask_problem",
    "shown",
    "size_of",
]

_ABSENT = object()
_NUMBERS = frozenset((int, float))
# Beyond it are infinity and integers that no float can hold; NaN compares as neither.
_LARGEST = 1e300
# What a box may exceed its image by: COCO's own are rounded.
_TOLERANCE = 0.5


def is_id(value):
    return type(value) is int and -(2**63) <= value < 2**63


def is_name(value):
    return isinstance(value, str) and value != ""


def is_file_name(value):
    return is_name(value) and len(value) <= 4096


def _is_side(value):
    return type(value) is int and 0 < value < 2**31


# For each key a test of its value and what the value must be; None where a function below tests it.
_ID = (is_id, "an integer of 64 bits")
_SIDE = (_is_side, "an integer > 0")
CATEGORY_FIELDS = {"id": _ID, "name": (is_name, "a string that is not empty")}
IMAGE_FIELDS = {
    "id": _ID,
    "file_name": (is_file_name, "a string of 1 to 4096 characters"),
    "height": _SIDE,
    "width": _SIDE,
}
ANNOTATION_FIELDS = {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": None}


def field_problems(entry, fields, known_ids):
    """Yield the problems of an entry's fields; its id must not be among the known ones."""
    if not isinstance(entry, dict):
        yield problems.NOT_AN_OBJECT, f"must be an object, not {described(entry)}"
        return
    for key, field in fields.items():
        value = entry.get(key, _ABSENT)
        if value is _ABSENT:
            yield problems.MISSING_KEY, f"lacks {key!r}"
        elif field is not None and not field[0](value):
            yield problems.WRONG_VALUE, f"has {key} {shown(value)}; it must be {field[1]}"
        elif key == "id" and value in known_ids:
            yield problems.REPEATED_ID, f"has the id {value} of another one"


def id_of(entry):
    """Return an entry's id, or None if it has no valid one."""
    identity = entry.get("id") if isinstance(entry, dict) else None
    return identity if is_id(identity) else None


def size_of(image):
    """Return an image's (height, width), or None if they are not valid."""
    size = image.get("height"), image.get("width")
    return size if all(map(_is_side, size)) else None


def box_problem(box, size):
    """Return the worst problem of a box in an image of a (height, width), or None."""
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        clause = f"has bbox {shown(box)}; it must be four numbers: x, y, width, height"
        return problems.BAD_BOX, clause
    for value in box:
        if not -_LARGEST < value < _LARGEST:
            return problems.INFINITE_BOX, f"has bbox {shown(box)}, which is not finite"
    x, y, width, height = box
    if width < 0 or height < 0:
        return problems.NEGATIVE_BOX, f"has bbox {shown(box)} of negative width or height"
    if width == 0 or height == 0:
        return problems.EMPTY_BOX, f"has bbox {shown(box)} of no width or height"
    if size is None:
        return None
    bottom, right = size
    if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        clause = f"has bbox {shown(box)} outside of the {right} x {bottom} image"
        return problems.OUTSIDE_BOX, clause
    if (
        x < -_TOLERANCE
        or y < -_TOLERANCE
        or x + width > right + _TOLERANCE
        or y + height > bottom + _TOLERANCE
    ):
        clause = f"has bbox {shown(box)} partly outside of the {right} x {bottom} image"
        return problems.PARTLY_OUTSIDE_BOX, clause
    return None


def crowd_problem(crowd):
    """Return the problem of a value of `iscrowd`, or None."""
    # detectron2 would take any other value for a crowd, "0" among them.
    if type(crowd) is int and crowd in (0, 1):
        return None
    return problems.BAD_CROWD, f"has iscrowd {shown(crowd)}; it must be the number 0 or 1"


def area_problem(area):
    """Return the problem of a value of `area`, or None."""
    if type(area) in _NUMBERS and 0 <= area < _LARGEST:
        return None
    return problems.BAD_AREA, f"has area {shown(area)}; it must be a finite number >= 0"


def mask_problem(segmentation, size):
    """Return the problem of a segmentation in an image of a (height, width), or None."""
    if isinstance(segmentation, list):
        return _polygon_problem(segmentation)
    if not isinstance(segmentation, dict):
        clause = f"has segmentation {shown(segmentation)}; it must be polygons or an RLE object"
        return problems.BAD_MASK, clause
    if not _is_rle(segmentation, size):
        return problems.BAD_MASK, (
            "has an RLE segmentation that is unusable: it needs 'size', the image's [height, "
            "width], and 'counts', a string or non-negative integers that sum to its pixels"
        )
    return None


def _polygon_problem(polygons):
    for polygon in polygons:
        if not isinstance(polygon, list) or not _NUMBERS.issuperset(map(type, polygon)):
            clause = f"has a polygon {shown(polygon)}; it must be a list of numbers"
            return problems.BAD_MASK, clause
        if not _has_finite_sum(polygon):
            return problems.BAD_MASK, "has a polygon with numbers that are not finite"
    for polygon in polygons:
        if len(polygon) % 2 or len(polygon) < 6:
            return problems.BAD_POLYGON, (
                f"has a polygon of {len(polygon)} numbers; without another one detectron2 drops "
                "the annotation"
            )
    return None


def _has_finite_sum(numbers):
    # Far quicker than to look at each of COCO's millions of numbers, and no finite one is so large.
    try:
        return -_LARGEST < sum(numbers) < _LARGEST
    except OverflowError:
        return False


def _is_rle(segmentation, size):
    counts, rle_size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(rle_size, list) or len(rle_size) != 2 or not all(map(_is_side, rle_size)):
        return False
    if size is not None and tuple(rle_size) != size:
        return False
    if isinstance(counts, list):
        counts_are_valid = all(type(count) is int and count >= 0 for count in counts)
        return counts_are_valid and sum(counts) == rle_size[0] * rle_size[1]
    return isinstance(counts, str)


# What a file holds is never shown raw in a message, but short and escaped.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = 5
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value):
    """Return a value of a json file for a message."""
    return _word(value) or _repr.repr(value)


def described(value):
    """Return the type of a value of a json file for a message."""
    name = type(value).__name__
    return _word(value) or f"{'an' if name == 'int' else 'a'} {name}"


def _word(value):
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else None
