"""What detectron2 needs to know of keypoints, from the categories of a COCO json."""

import re
from collections.abc import Sequence
from typing import Any

_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile("left|right", re.IGNORECASE)


def keypoint_names(category: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a category's keypoints; () if it has none, or no usable ones."""
    names = category.get("keypoints")
    usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if usable and len(set(names)) == len(names) else ()


def keypoint_metadata(names_by_category: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return metadata for the keypoints of a data set.

    Args:
        names_by_category: of each category, which may have none.

    Returns:
        dict: ``keypoint_names`` and ``keypoint_flip_map``, the pairs of names that differ in left
        and right alone. Empty if no category has keypoints, or if two have different ones, which
        detectron2 cannot train.
    """
    found = {tuple(names) for names in names_by_category if names}
    if len(found) != 1:
        return {}
    (names,) = found
    flipped = {name: _SIDE.sub(_other_side, name) for name in names}
    pairs = [
        (name, other)
        for name, other in flipped.items()
        if other in flipped and name != other and names.index(name) < names.index(other)
    ]
    return {"keypoint_names": list(names), "keypoint_flip_map": pairs}


def _other_side(match: re.Match) -> str:
    side = match[0]
    other = _SIDES[side.lower()]
    if side.isupper():
        return other.upper()
    return other.capitalize() if side[0].isupper() else other
