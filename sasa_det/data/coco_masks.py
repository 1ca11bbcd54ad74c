"""Masks of a COCO json file: polygons and run lengths, and what is wrong with them."""

import numpy as np

from . import coco_entries as problems
from .coco_entries import is_side, numbers_problem, shown

__all__ = ["mask_problem", "run_lengths", "usable_polygons"]

# In sizes of the image, from its corner: pycocotools walks along the edges of a polygon in steps
# of a fifth of a pixel, and keeps them all.
_MASK_EXTENT = 10
# Characters of a run length in pycocotools' compressed counts, of 5 bits each.
_MOST_CHARACTERS = 7


def mask_problem(segmentation, size):
    """Return the worst problem of a segmentation, or None.

    Args:
        segmentation (object): a value of the json file that is not empty.
        size (tuple[int, int] or None): (height, width) of the image, if they are valid.

    Returns:
        tuple[Kind, str] or None: BAD_MASK, EMPTY_MASK, or of polygons BAD_POLYGON or NO_POLYGON,
        and a clause.
    """
    if isinstance(segmentation, list):
        return _polygon_problem(segmentation, size)
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size)
    clause = f"has segmentation {shown(segmentation)}; it must be polygons or an RLE object"
    return problems.BAD_MASK, clause


def usable_polygons(polygons):
    """Return those of an instance's polygons that have 3 points or more, as detectron2 does."""
    return [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= 6]


def _polygon_problem(polygons, size):
    for polygon in polygons:
        if clause := numbers_problem(polygon):
            return problems.BAD_MASK, f"has a polygon {clause}"
        reach = _MASK_EXTENT * max(size or (0,))
        if reach and polygon and not -reach <= min(polygon) <= max(polygon) <= reach:
            clause = f"has a polygon with numbers beyond {_MASK_EXTENT} times the image's size"
            return problems.BAD_MASK, clause
    usable = usable_polygons(polygons)
    if usable and size and not any(_has_pixels(polygon, *size) for polygon in usable):
        return problems.EMPTY_MASK, "has polygons without a pixel in the image"
    if len(usable) == len(polygons):
        return None
    first = next((len(p) for p in polygons if len(p) % 2 or len(p) < 6), 0)
    kind = problems.BAD_POLYGON if usable else problems.NO_POLYGON
    rest = "" if usable else " and none that has at least 6 and an even count of them"
    return kind, f"has a polygon of {first} numbers{rest}"


def _has_pixels(polygon, height, width):
    xs, ys = polygon[0::2], polygon[1::2]
    right, bottom = min(max(xs), width), min(max(ys), height)
    return max(min(xs), 0) < right and max(min(ys), 0) < bottom


def _rle_problem(segmentation, size):
    lengths, clause = _checked_lengths(segmentation, size)
    if clause:
        return problems.BAD_MASK, f"has an RLE segmentation {clause}"
    if not any(lengths[1::2]):
        return problems.EMPTY_MASK, "has an RLE segmentation without a pixel"
    return None


def _checked_lengths(segmentation, size):
    """Return run lengths, and None or why they are not those of a mask of an image."""
    counts, rle_size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(rle_size, list) or len(rle_size) != 2 or not all(map(is_side, rle_size)):
        return None, "without 'size', the image's [height, width]"
    if size is not None and tuple(rle_size) != size:
        return None, f"of size {rle_size} for an image of height and width {list(size)}"
    if isinstance(counts, str):
        lengths = run_lengths(counts)
        if lengths is None:
            printed = counts[:2] in ("b'", 'b"')
            hint = ": they are a printed bytes object, of which they must be the decoded text"
            return (
                None,
                f"whose counts are not pycocotools' compressed ones{hint if printed else ''}",
            )
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        lengths = counts
    else:
        return None, "whose counts are neither a string nor integers"
    if any(length < 0 for length in lengths):
        return None, "with run lengths below 0"
    total, pixels = sum(lengths), rle_size[0] * rle_size[1]
    if total != pixels:
        return None, f"whose run lengths sum to {total}, not to its {pixels} pixels"
    return lengths, None


def run_lengths(counts):
    """Decode the run lengths of pycocotools' compressed RLE.

    pycocotools itself checks nothing: of counts that are too short it reads memory that is not its
    own.

    Args:
        counts (str): characters of 5 bits and one that says whether another follows, the lowest
            bits first, for each run length; from the third on less the one before the last.

    Returns:
        list[int] or None: the lengths, not checked; None if no encoder has written the counts.
    """
    if not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if codes.size and (codes.min() < 0 or codes.max() > 63 or codes[-1] & 32):
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    widths = ends - starts + 1
    if codes.size and widths.max() > _MOST_CHARACTERS:
        return None
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, widths))
    lengths = np.add.reduceat((codes & 31) << shifts, starts) if ends.size else ends
    lengths = lengths - np.where(codes[ends] & 16, 1 << 5 * widths, 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths.tolist()
