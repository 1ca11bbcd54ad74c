"""Where tiles of large images lie, and the boxes of objects in them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def tile_image(height: int, width: int, size: int, overlap: float) -> list[Tile]:
    """Cover an image with tiles.

    All tiles have the same size, for the last ones end at the border of the image and overlap more.
    An object whose sides are at most ``size * overlap`` pixels is whole in one of them.

    Args:
        height, width: of the image.
        size: height and width of a tile; a shorter side of the image stays whole.
        overlap: share of a tile that the next one shows as well, at least, in [0, 1).

    Returns:
        list[Tile]: row by row.
    """
    rows, columns = (_starts(side, size, overlap) for side in (height, width))
    return [Tile(x, y, min(x + size, width), min(y + size, height)) for y in rows for x in columns]


def _starts(side: int, size: int, overlap: float) -> list[int]:
    step = max(int(size * (1 - overlap)), 1)
    starts = list(range(0, max(side - size, 0), step))
    return [*starts, max(side - size, 0)]


def boxes_in_tile(boxes: np.ndarray, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes off at the border of a tile.

    Args:
        boxes: (N, 4) float X0, Y0, X1, Y1 in pixels of the image.
        tile: of the image.

    Returns:
        tuple: the boxes in pixels of the tile, (N, 4), and the share of each box's area that the
        tile shows, (N,) from 0 to 1; boxes without an area have none to show.
    """
    cut = boxes.clip(tile[:2] * 2, tile[2:] * 2)
    whole = _areas(boxes)
    shares = np.divide(_areas(cut), whole, out=np.zeros(len(boxes)), where=whole > 0)
    return cut - np.array(tile[:2] * 2), shares


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)


def turn_boxes(boxes: np.ndarray, image_size: Sequence[int], turns: int) -> np.ndarray:
    """Turn boxes as ``numpy.rot90(image, turns)`` turns their image, by 90 degrees to the left.

    Args:
        boxes: (N, 4) X0, Y0, X1, Y1 in pixels of the image.
        image_size: height and width of the image before it is turned.
        turns: how many times, at least 0.

    Returns:
        numpy.ndarray: (N, 4), in pixels of the turned image.
    """
    height, width = image_size
    for _ in range(turns):
        x0, y0, x1, y1 = boxes.T
        boxes = np.stack([y0, width - x1, y1, width - x0], axis=1)
        height, width = width, height
    return boxes
