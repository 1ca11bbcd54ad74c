"""The kinds of problems that COCO data have."""

from typing import NamedTuple

__all__ = ["Kind", "Problem"]


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        title (str): what it is, in the plural.
        severity (str): "error", which is refused, or "warning".
        training (bool or None): the one use that it matters for, True for training and False for
            evaluation; None where it matters for both.
        effect (str): what becomes of the data.
    """

    title: str
    severity: str
    training: bool | None = None
    effect: str = "refused"


def _error(title, training=None):
    return Kind(title, "error", training)


def _warning(title, effect, training=None):
    return Kind(title, "warning", training, effect)


NOT_COCO = _error("not COCO instances")
EMPTY_SECTION = _error("empty sections")
NOTHING_TO_TRAIN_ON = _error("nothing to train on", training=True)
NOT_AN_OBJECT = _error("entries that are no objects")
MISSING_KEY = _error("missing keys")
WRONG_VALUE = _error("values of a wrong type or range")
REPEATED_ID = _error("repeated ids")
UNKNOWN_REFERENCE = _error("annotations of unknown images or categories")
BAD_BOX = _error("boxes that are not four numbers")
INFINITE_BOX = _error("boxes that are not finite")
NEGATIVE_BOX = _error("boxes of negative width or height")
BAD_CROWD = _error("iscrowd other than 0 and 1")
IGNORED = _error("annotations with ignore, which detectron2 refuses")
MISSING_FOR_AP = _error("annotations without area or iscrowd", training=False)
BAD_AREA = _error("areas that are not finite numbers >= 0", training=False)
BAD_MASK = _error("unusable segmentations")
MISSING_MASK = _error("annotations without the mask that MODEL.MASK_ON needs")
MASK_NOT_POLYGON = _error("RLE masks under INPUT.MASK_FORMAT polygon", training=True)
UNSAFE_FILE = _error("file names that lead out of the image folder")
MISSING_FILE = _error("missing image files")
TOO_LARGE = _error("images of more pixels than INPUT.MAX_PIXELS")
UNREADABLE = _error("unreadable images")

EMPTY_BOX = _warning("boxes of no width or height", "training drops them")
OUTSIDE_BOX = _warning("boxes outside of their image", "training drops them")
PARTLY_OUTSIDE_BOX = _warning("boxes partly outside of their image", "training cuts them off")
BAD_POLYGON = _warning(
    "polygons of fewer than 6 or an odd count of numbers", "detectron2 drops them"
)
ID_ZERO = _warning("annotations of id 0", "the COCO metrics take them for none", training=False)
NO_AP = _warning("no annotations", "AP cannot be computed", training=False)
REPEATED_FILE = _warning("images that share a file", "each counts as an image of its own")
REPEATED_NAME = _warning("categories that share a name", "each is a class of its own")
UNUSED_CLASS = _warning("classes without boxes", "they cannot be learned")


class Problem(NamedTuple):
    """One problem; the ids are None where it is not about an image or an annotation."""

    kind: Kind
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
