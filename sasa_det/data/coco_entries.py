"""What is wrong with an entry of a COCO json file, by kind."""

import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        title: what it is, in the plural.
        effect: what becomes of the data, or what they probably are.
        training: the one use that it matters for, True for training and False for evaluation;
            None where it matters for both.
        has_share: whether a report gives the share of the annotations that have it.
        left_out_with: values of ``INPUT.MASK_FORMAT``, "" for no masks, with which training leaves
            out the annotations that have it.
    """

    title: str
    effect: str = "refused"
    training: bool | None = None
    has_share: bool = False
    left_out_with: Collection[str] = ()

    @property
    def severity(self) -> str:
        return "error" if self.effect == "refused" else "warning"


_ALWAYS = ("", "polygon", "bitmask")

# The file and its sections.
NOT_COCO = Kind("not COCO instances")
EMPTY_SECTION = Kind("empty sections")
NOTHING_TO_TRAIN_ON = Kind("nothing to train on", training=True)
NO_AP = Kind("no annotations", "AP cannot be computed", training=False)
UNUSED_CLASS = Kind("classes without boxes", "they cannot be learned")
# Any entry.
NOT_AN_OBJECT = Kind("entries that are not objects")
MISSING_KEY = Kind("missing keys")
WRONG_VALUE = Kind("values of a wrong type or range")
REPEATED_ID = Kind("repeated ids")
REPEATED_FILE = Kind("images that share a file", "each counts as an image of its own")
REPEATED_NAME = Kind("categories that share a name", "each is a class of its own")
UNKNOWN_REFERENCE = Kind("annotations of unknown images or categories")
# Image files.
UNSAFE_FILE = Kind("file names that lead out of the image folder")
MISSING_FILE = Kind("missing image files")
TOO_LARGE = Kind("images of more pixels than max_pixels (INPUT.MAX_PIXELS)")
UNREADABLE = Kind("unreadable images")
# Annotations of another format.
UNREADABLE_ANNOTATIONS = Kind("annotation files that cannot be read")
BAD_OBJECT = Kind("objects that cannot be read")
UNKNOWN_CLASS = Kind("objects of unknown classes")
WRONG_SIZE = Kind("images of another size than their annotations are for")
MISSING_ANNOTATIONS = Kind(
    "images without an annotation file", "they count as images without objects"
)
UNUSED_IMAGE = Kind("images that are not annotated", "left out")
UNUSED_ANNOTATIONS = Kind("annotation files without an image", "left out")
UNUSED_SHAPE = Kind("shapes that have no box", "left out")
# Annotations.
NEGATIVE_ID = Kind("annotations of negative id", training=False)
ID_ZERO = Kind(
    "annotations of id 0",
    "probably ids that count from 0; the COCO metrics take 0 for no object",
    training=False,
    has_share=True,
)
BAD_CROWD = Kind("iscrowd other than 0 and 1")
IGNORED = Kind("annotations with ignore, which detectron2 refuses")
MISSING_FOR_AP = Kind("annotations without area or iscrowd", training=False)
BAD_AREA = Kind("areas that are not numbers from 0 to 1e30", training=False)
ZERO_AREA = Kind(
    "annotations of area 0 with a box that is not empty",
    "probably areas that were never computed; all count as small in APs, APm and APl",
    training=False,
    has_share=True,
)
DUPLICATE = Kind(
    "annotations with the image, class and box of another one",
    "probably exact duplicates; each counts as an object of its own",
    has_share=True,
)
# Boxes.
BAD_BOX = Kind("boxes that are not four numbers")
INFINITE_BOX = Kind("boxes of NaN, infinity or numbers beyond 1e30")
NEGATIVE_BOX = Kind("boxes of negative width or height")
EMPTY_BOX = Kind("boxes of no width or height", "training drops them", left_out_with=_ALWAYS)
OUTSIDE_BOX = Kind("boxes outside of their image", "training drops them", left_out_with=_ALWAYS)
PARTLY_OUTSIDE_BOX = Kind("boxes partly outside of their image", "training cuts them off")
FRACTION_BOX = Kind(
    "boxes within 0..1",
    "probably fractions of the image's size; they are taken for pixels",
    has_share=True,
)
CORNER_BOX = Kind(
    "boxes that leave their image unless their numbers are two corners",
    "probably stored as x0, y0, x1, y1; they are taken for x, y, width, height",
    has_share=True,
)
BOX_MODE = Kind(
    "annotations with bbox_mode",
    "probably detectron2's own dicts; bbox is taken for x, y, width, height all the same",
    has_share=True,
)
# Masks.
BAD_MASK = Kind("unusable segmentations")
UNUSED_MASK = Kind("unusable segmentations", "left alone, because masks are not used")
MISSING_MASK = Kind("annotations without the mask that use_instance_mask (MODEL.MASK_ON) needs")
MISSING_MASK_FOR_AP = Kind("annotations without the mask that mask AP needs", training=False)
MASK_NOT_POLYGON = Kind(
    "RLE masks under instance_mask_format (INPUT.MASK_FORMAT) polygon", training=True
)
BAD_POLYGON = Kind("polygons of fewer than 6 or an odd count of numbers", "left out of masks")
NO_POLYGON = Kind(
    "annotations without a usable polygon",
    "training of masks drops them",
    left_out_with=("polygon", "bitmask"),
)
EMPTY_MASK = Kind(
    "masks without a pixel in their image",
    "training with instance_mask_format (INPUT.MASK_FORMAT) bitmask drops them",
    left_out_with=("bitmask",),
)
# Keypoints.
BAD_KEYPOINTS = Kind(
    "annotations without the keypoints that use_keypoint (MODEL.KEYPOINT_ON) needs"
)
BAD_KEYPOINTS_FOR_AP = Kind("annotations that keypoint AP cannot use", training=False)
UNUSED_KEYPOINTS = Kind("unusable keypoints", "left alone, because keypoints are not used")
NO_VISIBLE_KEYPOINT = Kind(
    "annotations without a labelled keypoint",
    "training drops images of them alone",
    left_out_with=_ALWAYS,
)

# A problem of an entry: its kind, and the rest of a sentence that begins with the entry's name.
Finding = tuple[Kind, str]


class Problem(NamedTuple):
    """One problem; the ids are None where it is not about an image or an annotation."""

    kind: Kind
    message: str
    image_id: int | None = None
    annotation_id: int | None = None


_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBERS = frozenset((int, float))
# Beyond it are infinity and what the float32 of a box cannot hold; NaN compares as neither.
_LARGEST = 1e30
# What a box may exceed its image by: COCO's own are rounded.
_TOLERANCE = 0.5
# Training drops boxes of this width or height or less, what is outside of the image being cut off.
_SMALLEST = 1e-5


def is_side(value: object) -> bool:
    """Return whether a value can be the height or width of an image."""
    return type(value) is int and 0 < value < 2**31


class _Field(NamedTuple):
    """What a key of an entry must hold.

    Attributes:
        is_valid: tests a value.
        must_be: the test in words.
        wrong: the kind of a value that does not pass it.
        repeated: the kind of a value that an earlier entry has, if that is a problem.
        section: the section that has an entry of this id, if the value is one.
    """

    is_valid: Callable[[object], bool]
    must_be: str
    wrong: Kind = WRONG_VALUE
    repeated: Kind | None = None
    section: str | None = None


def _is_name(value: object) -> bool:
    # TensorBoard fails on half of a surrogate pair, which no UTF-8 can hold.
    return isinstance(value, str) and value != "" and not _SURROGATE.search(value)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096


def _is_crowd(value: object) -> bool:
    # detectron2 would take any other value for a crowd, "0" among them.
    return type(value) is int and value in (0, 1)


def _is_area(value: object) -> bool:
    return type(value) in _NUMBERS and 0 <= value < _LARGEST


def _is_box(value: object) -> bool:
    return type(value) is list and len(value) == 4 and _NUMBERS.issuperset(map(type, value))


_ID = _Field(
    lambda value: type(value) is int and -(2**63) <= value < 2**63, "an integer of 64 bits"
)
_OWN_ID = _ID._replace(repeated=REPEATED_ID)
_SIDE = _Field(is_side, "an integer > 0")
_NAME = _Field(_is_name, "a string of Unicode characters that is not empty", repeated=REPEATED_NAME)
_FILE_NAME = _Field(_is_file_name, "a string of 1 to 4096 characters", repeated=REPEATED_FILE)
# The sections of a file, each after those that it refers to.
FIELDS = {
    "categories": {"id": _OWN_ID, "name": _NAME},
    "images": {"id": _OWN_ID, "file_name": _FILE_NAME, "height": _SIDE, "width": _SIDE},
    "annotations": {
        "id": _OWN_ID,
        "image_id": _ID._replace(section="images"),
        "iscrowd": _Field(_is_crowd, "the number 0 or 1", BAD_CROWD),
        "category_id": _ID._replace(section="categories"),
        "bbox": _Field(_is_box, "four numbers: x, y, width, height", BAD_BOX),
        "area": _Field(_is_area, "a number >= 0, and below 1e30", BAD_AREA),
        "ignore": _Field(lambda value: value == 0, "0 or absent", IGNORED),
    },
}
_OPTIONAL = ("iscrowd", "area", "ignore")


def check_fields(
    section: str, index: int, entry: object, seen: Mapping[tuple[str, str], dict[Any, int]]
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the valid fields of an entry, and what is wrong with the others.

    Args:
        section, index: where the entry is in the file.
        entry: a value of the json file.
        seen: for each section and key the index of the first entry that has a value; changed.
    """
    if not isinstance(entry, dict):
        return {}, [(NOT_AN_OBJECT, f"must be an object, not {described(entry)}")]
    valid, found = {}, []
    for key, field in FIELDS[section].items():
        if key not in entry:
            if key not in _OPTIONAL:
                found.append((MISSING_KEY, f"lacks {key!r}"))
            continue
        value = entry[key]
        if not field.is_valid(value):
            clause = f"has {key} {shown(value)}; it must be {field.must_be}"
            found.append((field.wrong, clause))
            continue
        if field.section and value not in seen[field.section, "id"]:
            known = f"{len(seen[field.section, 'id'])} {field.section}"
            clause = f"has {key} {value}, which is not the id of any of the {known}"
            found.append((UNKNOWN_REFERENCE, clause))
            continue
        valid[key] = value
        if field.repeated:
            first = seen[section, key].setdefault(value, index)
            if first != index:
                clause = f"has the {key} {shown(value)} of {section}[{first}]"
                found.append((field.repeated, clause))
    return valid, found


def box_problems(entry: dict[str, Any], size: tuple[int, int] | None) -> Iterator[Finding]:
    """Yield what is wrong with the box, four numbers, of an annotation.

    The size is the (height, width) of the image, if they are valid.
    """
    box = entry["bbox"]
    kind, rest = _worst_of_box(box, size) or (None, "")
    if kind:
        yield kind, f"has bbox {shown(box)}{rest}"
        if kind.severity == "error":
            return
    if "bbox_mode" in entry:
        yield BOX_MODE, f"has bbox_mode {shown(entry['bbox_mode'])}"
    if 0 <= min(box) and max(box) <= 1 and any(value % 1 for value in box):
        yield FRACTION_BOX, f"has bbox {shown(box)} within 0..1"
    if kind in (OUTSIDE_BOX, PARTLY_OUTSIDE_BOX):
        x0, y0, x1, y1 = box
        if 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]:
            clause = f"has bbox {shown(box)}, which fits the image as two corners alone"
            yield CORNER_BOX, clause
    if entry.get("area") == 0 and kind != EMPTY_BOX:
        yield ZERO_AREA, f"has area 0 and bbox {shown(box)}"


def _worst_of_box(box: list[float], size: tuple[int, int] | None) -> Finding | None:
    for value in box:
        if not -_LARGEST < value < _LARGEST:
            return INFINITE_BOX, ", which float32 cannot hold"
    x, y, width, height = box
    if width < 0 or height < 0:
        return NEGATIVE_BOX, " of negative width or height"
    if width <= _SMALLEST or height <= _SMALLEST:
        return EMPTY_BOX, " of no width or height"
    if size is None:
        return None
    bottom, right = size
    inner_width = min(x + width, right) - max(x, 0)
    inner_height = min(y + height, bottom) - max(y, 0)
    if inner_width <= _SMALLEST or inner_height <= _SMALLEST:
        return OUTSIDE_BOX, f" outside of the {right} x {bottom} image"
    if max(-x, -y, x + width - right, y + height - bottom) > _TOLERANCE:
        return PARTLY_OUTSIDE_BOX, f" partly outside of the {right} x {bottom} image"
    return None


def numbers_problem(values: object) -> str | None:
    """Return a clause about a value that is not a list of finite numbers, or None."""
    if not isinstance(values, list) or not _NUMBERS.issuperset(map(type, values)):
        return f"{shown(values)}; it must be a list of numbers"
    # Far quicker than to look at each of COCO's millions of numbers, and no finite one is so large.
    try:
        is_finite = -_LARGEST < sum(values) < _LARGEST
    except OverflowError:
        is_finite = False
    return None if is_finite else "with numbers that float32 cannot hold"


def keypoints_problems(entry: dict[str, Any], number: int) -> Iterator[Finding]:
    """Yield what is wrong with the keypoints of an annotation; 0 are needed if none are used."""
    keypoints, visible = entry.get("keypoints"), entry.get("num_keypoints")
    if not number and not keypoints:
        return
    clause = numbers_problem(keypoints)
    if not number:
        if clause:
            yield UNUSED_KEYPOINTS, f"has keypoints {clause}"
        return
    if clause is None and len(keypoints) != 3 * number:
        clause = f"of {len(keypoints)} numbers; there must be x, y and visibility of {number}"
    if clause is None and not {0, 1, 2}.issuperset(keypoints[2::3]):
        clause = "of a visibility other than 0, 1 and 2"
    if clause:
        yield BAD_KEYPOINTS, f"has keypoints {clause}"
    elif type(visible) is not int or visible < 0:
        clause = "it must be how many of its keypoints are labelled"
        yield BAD_KEYPOINTS_FOR_AP, f"has num_keypoints {shown(visible)}; {clause}"
    elif not any(keypoints[2::3]):
        yield NO_VISIBLE_KEYPOINT, "has no labelled keypoint"


# What a file holds is never shown raw in a message, but short and escaped.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = 5
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: object) -> str:
    """Return a value of a json file for a message."""
    return _literal(value) or _repr.repr(value)


def described(value: object) -> str:
    """Return the type of a value of a json file for a message."""
    name = type(value).__name__
    return _literal(value) or f"{'an' if name == 'int' else 'a'} {name}"


def _literal(value: object) -> str | None:
    return json.dumps(value) if value is None or isinstance(value, bool) else None
