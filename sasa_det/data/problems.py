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
