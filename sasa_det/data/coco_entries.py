"""What is wrong with a part of a COCO json file, as the kind of a problem and a clause about it."""

import re
import reprlib

from . import problems

__all__ = [
    "ANNOTATION_FIELDS",
    "CATEGORY_FIELDS",
    "IMAGE_FIELDS",
    "area_problem",
    "are_corners",
    "are_fractions",
    "box_problem",
    "crowd_problem",
    "described",
    "field_problems",
    "id_of",
    "is_file_name",
    "is_id",
    "is_name",
    "is_side",
    "keypoints_problem",
    "numbers_problem",
    "shown",
    "size_of",
]

_ABSENT = object()
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBERS = frozenset((int, float))
# Beyond it are infinity and what the float32 of a box cannot hold; NaN compares as neither.
_LARGEST = 1e30
# What a box may exceed its image by: COCO's own are rounded.
_TOLERANCE = 0.5
# Training drops boxes of this width or height or less, what is outside of the image being cut off.
_SMALLEST = 1e-5


def is_id(value):
    return type(value) is int and -(2**63) <= value < 2**63


def is_name(value):
    # TensorBoard fails on half of a surrogate pair, which no UTF-8 can hold.
    return isinstance(value, str) and value != "" and not _SURROGATE.search(value)


def is_file_name(value):
    return isinstance(value, str) and 0 < len(value) <= 4096


def is_side(value):
    return type(value) is int and 0 < value < 2**31


# For each key a test of its value and what the value must be; None where a function below tests it.
_ID = (is_id, "an integer of 64 bits")
_SIDE = (is_side, "an integer > 0")
CATEGORY_FIELDS = {"id": _ID, "name": (is_name, "a string of Unicode characters that is not empty")}
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
    return size if all(map(is_side, size)) else None


def box_problem(box, size):
    """Return the worst problem of a box in an image of a (height, width), or None."""
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        clause = f"has bbox {shown(box)}; it must be four numbers: x, y, width, height"
        return problems.BAD_BOX, clause
    for value in box:
        if not -_LARGEST < value < _LARGEST:
            return problems.INFINITE_BOX, f"has bbox {shown(box)}, which float32 cannot hold"
    x, y, width, height = box
    if width < 0 or height < 0:
        return problems.NEGATIVE_BOX, f"has bbox {shown(box)} of negative width or height"
    if width <= _SMALLEST or height <= _SMALLEST:
        return problems.EMPTY_BOX, f"has bbox {shown(box)} of no width or height"
    if size is None:
        return None
    bottom, right = size
    if (
        min(x + width, right) - max(x, 0) <= _SMALLEST
        or min(y + height, bottom) - max(y, 0) <= _SMALLEST
    ):
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


def are_fractions(box):
    """Tell whether the numbers of a valid box lie within 0..1 and are not all of them integers."""
    return 0 <= min(box) and max(box) <= 1 and any(value % 1 for value in box)


def are_corners(box, size):
    """Tell whether a valid box would lie in its image if its numbers were x0, y0, x1, y1."""
    x, y, right, bottom = box
    return 0 <= x < right <= size[1] and 0 <= y < bottom <= size[0]


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
    return problems.BAD_AREA, f"has area {shown(area)}; it must be a number >= 0, and below 1e30"


def numbers_problem(values):
    """Return a clause about a value that is no list of finite numbers, or None."""
    if not isinstance(values, list) or not _NUMBERS.issuperset(map(type, values)):
        return f"{shown(values)}; it must be a list of numbers"
    # Far quicker than to look at each of COCO's millions of numbers, and no finite one is so large.
    try:
        is_finite = -_LARGEST < sum(values) < _LARGEST
    except OverflowError:
        is_finite = False
    return None if is_finite else "with numbers that float32 cannot hold"


def keypoints_problem(entry, number):
    """Return the problem of an annotation that must have so many keypoints, or None."""
    keypoints, visible = entry.get("keypoints"), entry.get("num_keypoints")
    clause = numbers_problem(keypoints)
    if clause is None and len(keypoints) != 3 * number:
        clause = f"of {len(keypoints)} numbers; there must be x, y and visibility of {number}"
    if clause is None and not {0, 1, 2}.issuperset(keypoints[2::3]):
        clause = "of a visibility other than 0, 1 and 2"
    if clause is not None:
        return problems.BAD_KEYPOINTS, f"has keypoints {clause}"
    if type(visible) is not int or visible < 0:
        return problems.BAD_KEYPOINTS_FOR_AP, (
            f"has num_keypoints {shown(visible)}; it must be how many of its keypoints are labelled"
        )
    return None


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
