"""What is wrong with an entry of a COCO json file, by kind."""

import re
import reprlib
from typing import NamedTuple

__all__ = [
    "ANNOTATION_FIELDS",
    "CATEGORY_FIELDS",
    "IMAGE_FIELDS",
    "Kind",
    "Problem",
    "are_corners",
    "are_fractions",
    "area_problem",
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


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        title (str): what it is, in the plural.
        severity (str): "error", which is refused, or "warning".
        training (bool or None): the one use that it matters for, True for training and False for
            evaluation; None where it matters for both.
        effect (str): what becomes of the data, or what they probably are.
        has_share (bool): whether a report tells the share of the annotations that have it.
    """

    title: str
    severity: str
    training: bool | None = None
    effect: str = "refused"
    has_share: bool = False


def _error(title, training=None):
    return Kind(title, "error", training)


def _warning(title, effect, training=None):
    return Kind(title, "warning", training, effect)


def _suspicion(title, effect, training=None):
    return Kind(title, "warning", training, effect, has_share=True)


NOT_COCO = _error("not COCO instances")

EMPTY_SECTION = _error("empty sections")

NOTHING_TO_TRAIN_ON = _error("nothing to train on", training=True)

NOT_AN_OBJECT = _error("entries that are no objects")

MISSING_KEY = _error("missing keys")

WRONG_VALUE = _error("values of a wrong type or range")

REPEATED_ID = _error("repeated ids")

UNKNOWN_REFERENCE = _error("annotations of unknown images or categories")

BAD_BOX = _error("boxes that are not four numbers")

INFINITE_BOX = _error("boxes of NaN, infinity or numbers beyond 1e30")

NEGATIVE_BOX = _error("boxes of negative width or height")

BAD_CROWD = _error("iscrowd other than 0 and 1")

IGNORED = _error("annotations with ignore, which detectron2 refuses")

MISSING_FOR_AP = _error("annotations without area or iscrowd", training=False)

NEGATIVE_ID = _error("annotations of negative id", training=False)

BAD_AREA = _error("areas that are not numbers from 0 to 1e30", training=False)

BAD_MASK = _error("unusable segmentations")

MISSING_MASK = _error("annotations without the mask that MODEL.MASK_ON needs")

MISSING_MASK_FOR_AP = _error("annotations without the mask that mask AP needs", training=False)

MASK_NOT_POLYGON = _error("RLE masks under INPUT.MASK_FORMAT polygon", training=True)

BAD_KEYPOINTS = _error("annotations without the keypoints that MODEL.KEYPOINT_ON needs")

BAD_KEYPOINTS_FOR_AP = _error("annotations that keypoint AP cannot use", training=False)

UNSAFE_FILE = _error("file names that lead out of the image folder")

MISSING_FILE = _error("missing image files")

TOO_LARGE = _error("images of more pixels than INPUT.MAX_PIXELS")

UNREADABLE = _error("unreadable images")

EMPTY_BOX = _warning("boxes of no width or height", "training drops them")

OUTSIDE_BOX = _warning("boxes outside of their image", "training drops them")

PARTLY_OUTSIDE_BOX = _warning("boxes partly outside of their image", "training cuts them off")

BAD_POLYGON = _warning("polygons of fewer than 6 or an odd count of numbers", "left out of masks")

NO_POLYGON = _warning("annotations without a usable polygon", "training of masks drops them")

EMPTY_MASK = _warning(
    "masks without a pixel in their image", "training with INPUT.MASK_FORMAT bitmask drops them"
)

UNUSED_MASK = _warning("unusable segmentations", "left alone, for masks are not used")

UNUSED_KEYPOINTS = _warning("unusable keypoints", "left alone, for keypoints are not used")

NO_VISIBLE_KEYPOINT = _warning(
    "annotations without a labelled keypoint", "training drops images of them alone"
)

NO_AP = _warning("no annotations", "AP cannot be computed", training=False)

REPEATED_FILE = _warning("images that share a file", "each counts as an image of its own")

REPEATED_NAME = _warning("categories that share a name", "each is a class of its own")

UNUSED_CLASS = _warning("classes without boxes", "they cannot be learned")

FRACTION_BOX = _suspicion(
    "boxes within 0..1",
    "probably fractions of the image's size; they are taken for pixels",
)

CORNER_BOX = _suspicion(
    "boxes that leave their image unless their numbers are two corners",
    "probably stored as x0, y0, x1, y1; they are taken for x, y, width, height",
)

BOX_MODE = _suspicion(
    "annotations with bbox_mode",
    "probably detectron2's own dicts; bbox is taken for x, y, width, height all the same",
)

DUPLICATE = _suspicion(
    "annotations with the image, class and box of another one",
    "probably exact duplicates; each counts as an object of its own",
)

ZERO_AREA = _suspicion(
    "annotations of area 0 with a box that is not empty",
    "probably areas that were never computed; all count as small in APs, APm and APl",
    training=False,
)

ID_ZERO = _suspicion(
    "annotations of id 0",
    "probably ids that count from 0; the COCO metrics take 0 for no object",
    training=False,
)


class Problem(NamedTuple):
    """One problem; the ids are None where it is not about an image or an annotation."""

    kind: Kind
    message: str
    image_id: int | None = None
    annotation_id: int | None = None


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
        yield NOT_AN_OBJECT, f"must be an object, not {described(entry)}"
        return
    for key, field in fields.items():
        value = entry.get(key, _ABSENT)
        if value is _ABSENT:
            yield MISSING_KEY, f"lacks {key!r}"
        elif field is not None and not field[0](value):
            yield WRONG_VALUE, f"has {key} {shown(value)}; it must be {field[1]}"
        elif key == "id" and value in known_ids:
            yield REPEATED_ID, f"has the id {value} of another one"


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
        return BAD_BOX, clause
    for value in box:
        if not -_LARGEST < value < _LARGEST:
            return INFINITE_BOX, f"has bbox {shown(box)}, which float32 cannot hold"
    x, y, width, height = box
    if width < 0 or height < 0:
        return NEGATIVE_BOX, f"has bbox {shown(box)} of negative width or height"
    if width <= _SMALLEST or height <= _SMALLEST:
        return EMPTY_BOX, f"has bbox {shown(box)} of no width or height"
    if size is None:
        return None
    bottom, right = size
    if (
        min(x + width, right) - max(x, 0) <= _SMALLEST
        or min(y + height, bottom) - max(y, 0) <= _SMALLEST
    ):
        clause = f"has bbox {shown(box)} outside of the {right} x {bottom} image"
        return OUTSIDE_BOX, clause
    if (
        x < -_TOLERANCE
        or y < -_TOLERANCE
        or x + width > right + _TOLERANCE
        or y + height > bottom + _TOLERANCE
    ):
        clause = f"has bbox {shown(box)} partly outside of the {right} x {bottom} image"
        return PARTLY_OUTSIDE_BOX, clause
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
    return BAD_CROWD, f"has iscrowd {shown(crowd)}; it must be the number 0 or 1"


def area_problem(area):
    """Return the problem of a value of `area`, or None."""
    if type(area) in _NUMBERS and 0 <= area < _LARGEST:
        return None
    return (
        BAD_AREA,
        f"has area {shown(area)}; it must be a number >= 0, and below 1e30",
    )


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
        return BAD_KEYPOINTS, f"has keypoints {clause}"
    if type(visible) is not int or visible < 0:
        return BAD_KEYPOINTS_FOR_AP, (
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
