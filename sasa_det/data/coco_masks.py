"""Masks of a COCO json file: polygons and run lengths, and what is wrong with them."""

from collections.abc import Iterator

import numpy as np
from pycocotools.mask import frPyObjects

from . import coco_entries as problems
from .coco_entries import Finding, is_side, numbers_problem, shown

# In sizes of the image, from its corner: pycocotools walks along the edges of a polygon in steps
# of a fifth of a pixel, and keeps them all.
_MASK_EXTENT = 10
# Characters of a run length in pycocotools' compressed counts, of 5 bits each.
_MOST_CHARACTERS = 7


def mask_problems(
    segmentation: object, size: tuple[int, int] | None, mask_format: str, is_crowd: bool
) -> Iterator[Finding]:
    """Yield what is wrong with the segmentation of an annotation.

    Args:
        segmentation: a value of the json file.
        size: (height, width) of the image, if they are valid.
        mask_format: as ``INPUT.MASK_FORMAT``; "" where masks are not used.
        is_crowd: whether training leaves the annotation out before it looks at its mask.
    """
    if not segmentation:
        if mask_format:
            kind = problems.MISSING_MASK_FOR_AP if is_crowd else problems.MISSING_MASK
            yield kind, "lacks 'segmentation', which use_instance_mask (MODEL.MASK_ON) needs"
        return
    kind, clause = mask_problem(segmentation, size) or (None, "")
    if not mask_format:
        if kind == problems.BAD_MASK:
            yield problems.UNUSED_MASK, clause
        elif kind and kind != problems.EMPTY_MASK:
            yield kind, clause
        return
    if kind:
        yield kind, clause
    if kind == problems.BAD_MASK:
        return
    if mask_format == "polygon" and isinstance(segmentation, dict) and not is_crowd:
        clause = "has an RLE mask; set instance_mask_format (INPUT.MASK_FORMAT) to bitmask"
        yield problems.MASK_NOT_POLYGON, clause
    if kind and size and isinstance(segmentation, list):
        try:
            frPyObjects(segmentation, *size)
        except Exception as error:  # pycocotools raises bare ones
            clause = f"has a segmentation that pycocotools refuses: {error}"
            yield problems.MISSING_MASK_FOR_AP, clause


def mask_problem(segmentation: object, size: tuple[int, int] | None) -> Finding | None:
    """Return the worst problem of a segmentation that is not empty, or None."""
    if isinstance(segmentation, list):
        return _polygon_problem(segmentation, size)
    if not isinstance(segmentation, dict):
        clause = f"has segmentation {shown(segmentation)}; it must be polygons or an RLE object"
        return problems.BAD_MASK, clause
    try:
        lengths = _checked_lengths(segmentation, size)
    except ValueError as error:
        return problems.BAD_MASK, f"has an RLE segmentation {error}"
    if any(lengths[1::2]):
        return None
    return problems.EMPTY_MASK, "has an RLE segmentation without a pixel"


def usable_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """Return those of an instance's polygons that have 3 points or more, as detectron2 does."""
    return [polygon for polygon in polygons if len(polygon) % 2 == 0 and len(polygon) >= 6]


def _polygon_problem(polygons: list, size: tuple[int, int] | None) -> Finding | None:
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
    unusable = [len(polygon) for polygon in polygons if polygon not in usable]
    if not unusable:
        return None
    kind = problems.BAD_POLYGON if usable else problems.NO_POLYGON
    rest = "" if usable else " and none that has at least 6 and an even count of them"
    return kind, f"has a polygon of {unusable[0]} numbers{rest}"


def _has_pixels(polygon: list[float], height: int, width: int) -> bool:
    xs, ys = polygon[0::2], polygon[1::2]
    right, bottom = min(max(xs), width), min(max(ys), height)
    return max(min(xs), 0) < right and max(min(ys), 0) < bottom


def _checked_lengths(segmentation: dict, size: tuple[int, int] | None) -> list[int]:
    """Return the run lengths of a mask; the ValueError for those of no mask is a clause."""
    counts, rle_size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(rle_size, list) or len(rle_size) != 2 or not all(map(is_side, rle_size)):
        raise ValueError("without 'size', the image's [height, width]")
    if size is not None and tuple(rle_size) != size:
        raise ValueError(f"of size {rle_size} for an image of height and width {list(size)}")
    if isinstance(counts, str):
        lengths = run_lengths(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        lengths = counts
    else:
        raise ValueError("whose counts are neither a string nor integers")
    if any(length < 0 for length in lengths):
        raise ValueError("with run lengths below 0")
    total, pixels = sum(lengths), rle_size[0] * rle_size[1]
    if total != pixels:
        raise ValueError(f"whose run lengths sum to {total}, not to its {pixels} pixels")
    return lengths


def run_lengths(counts: str) -> list[int]:
    """Decode the run lengths of pycocotools' compressed RLE.

    pycocotools itself checks nothing: of counts that are too short it reads foreign memory.

    Args:
        counts: characters of 5 bits and one that says whether another follows, the lowest bits
            first, for each run length; from the third on less the one before the last.

    Raises:
        ValueError: if no encoder has written the counts; the message is a clause.
    """
    codes = np.array([ord(character) - 48 for character in counts], np.int64)
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    widths = ends - starts + 1
    if (
        ((codes < 0) | (codes > 63)).any()
        or (codes[-1:] & 32).any()
        or (widths > _MOST_CHARACTERS).any()
    ):
        printed = counts[:2] in ("b'", 'b"')
        hint = ": they are a printed bytes object, of which they must be the decoded text"
        raise ValueError(
            f"whose counts are not pycocotools' compressed ones{hint if printed else ''}"
        )
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, widths))
    lengths = np.add.reduceat((codes & 31) << shifts, starts) if ends.size else ends
    lengths = lengths - np.where(codes[ends] & 16, 1 << 5 * widths, 0)
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths.tolist()
