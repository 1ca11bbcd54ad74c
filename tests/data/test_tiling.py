"""Tiles of large images, and the boxes in them, against pixels that are counted."""

from itertools import pairwise

import numpy as np
import pytest

from sasa_det.data.tiling import Tile, boxes_in_tile, tile_image, turn_boxes


@pytest.mark.parametrize("side", (1, 99, 100, 101, 180, 181, 777))
@pytest.mark.parametrize("overlap", (0.0, 0.2, 0.5, 0.999))
def test_tiles_cover_an_image_with_the_overlap(side, overlap):
    tiles = tile_image(side, 300, 100, overlap)
    seen = np.zeros((side, 300), int)
    for x0, y0, x1, y1 in tiles:
        assert y1 - y0 == min(100, side) and x1 - x0 == 100 and y0 >= 0 and x0 >= 0
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1 and len(set(tiles)) == len(tiles)
    starts = sorted({tile.y0 for tile in tiles})
    assert all(b - a <= max(100 * (1 - overlap), 1) for a, b in pairwise(starts))


@pytest.mark.parametrize("size, overlap", [(100, 0.5), (64, 0.3), (20, 0.9), (300, 0.1)])
def test_objects_of_the_size_of_the_overlap_are_whole_in_a_tile(size, overlap):
    tiles = tile_image(93, 171, size, overlap)
    side = int(size * overlap)
    # By the pixel that an object begins at.
    whole = np.zeros((93 - side + 1, 171 - side + 1), bool)
    for x0, y0, x1, y1 in tiles:
        whole[y0 : y1 - side + 1, x0 : x1 - side + 1] = True
    assert whole.size > 3000 and whole.all()


def test_boxes_are_cut_at_the_border_of_a_tile():
    boxes = np.array(
        [
            [10, 20, 30, 40],  # whole
            [-5, 20, 15, 40],  # three quarters of its width are outside on the left
            [90, 100, 110, 140],  # a quarter
            [0, 0, 10, 10],  # outside, where the tile begins
            [50, 50, 50, 60],  # without an area
        ],
        dtype=float,
    )
    cut, shares = boxes_in_tile(boxes, Tile(10, 20, 100, 120))
    assert cut[:3].tolist() == [[0, 0, 20, 20], [0, 0, 5, 20], [80, 80, 90, 100]]
    assert shares.tolist() == [1, 0.25, 0.25, 0, 0]


def test_no_boxes():
    cut, shares = boxes_in_tile(np.zeros((0, 4)), Tile(0, 0, 5, 5))
    assert turn_boxes(cut, (5, 5), 3).shape == (0, 4) and shares.shape == (0,)


@pytest.mark.parametrize("turns", range(6))
def test_boxes_turn_with_their_image(turns):
    image = np.zeros((9, 14), int)
    boxes = np.array([[2, 3, 7, 5], [0, 0, 1, 9], [8, 4, 14, 8]], dtype=float)
    for value, (x0, y0, x1, y1) in enumerate(boxes.astype(int), 1):
        image[y0:y1, x0:x1] = value
    turned = np.rot90(image, turns)
    for value, box in enumerate(turn_boxes(boxes, image.shape, turns), 1):
        rows, columns = np.nonzero(turned == value)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
