"""The boxes of a large image's tiles, merged, are those of the whole image."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from sasa_det.data.tiling import Tile, tile_image
from sasa_det.engine.tiles import merge_tiles


def detect(image):
    """An exact detector of what shines on black: boxes of connected pixels.

    The class is that of the pixels and of the form, so that the part of an object may seem to be of
    another one, and what is smaller is more certain, so that it has a higher score.
    """
    _, _, found, _ = cv2.connectedComponentsWithStats((image > 0).astype(np.uint8))
    boxes = [(x, y, x + width, y + height) for x, y, width, height, _ in found[1:]]
    instances = Instances(image.shape)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([1 / (1 + int(size)) for *_, size in found[1:]])
    classes = [int(image[y, x]) + 3 * bool(y1 - y > x1 - x) for x, y, x1, y1 in boxes]
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def place_rectangles(rng, height, width, longest):
    """Draw rectangles that do not touch, none longer than a length."""
    image = np.zeros((height, width), np.uint8)
    for _ in range(400):
        h, w = rng.integers(3, longest + 1, 2)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        if not image[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1].any():
            image[y : y + h, x : x + w] = rng.integers(1, 4)
    return image


def as_rows(instances):
    rows = torch.column_stack(
        (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
    )
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size, overlap", ((64, 0.5), (90, 0.3), (128, 0.2), (1000, 0.2)))
def test_boxes_are_those_of_the_whole_image(seed, size, overlap):
    """Where every object is whole in a tile, and is cut by the borders of others."""
    rng = np.random.default_rng(seed)
    height, width = 257, 331
    # Where an object is within two pixels of a border, it is not known to be whole.
    image = place_rectangles(rng, height, width, longest=int(min(size, 130) * overlap) - 6)
    tiles = tile_image(height, width, size, overlap)
    parts = [detect(image[y0:y1, x0:x1]) for x0, y0, x1, y1 in tiles]
    whole = detect(image)
    if len(tiles) > 1:
        assert sum(map(len, parts)) > 1.2 * len(whole)
    merged = merge_tiles(parts, tiles, (height, width), nms_threshold=0.5)
    assert len(whole) > 20 and as_rows(merged) == as_rows(whole)
    assert merged.scores.tolist() == sorted(merged.scores.tolist(), reverse=True)


def instances_of(boxes, scores, classes, size=(100, 100)):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


PAIR = [Tile(0, 0, 100, 100), Tile(80, 0, 180, 100)]


def merge_pair(first, second):
    merged = merge_tiles([first, second], PAIR, (100, 180), nms_threshold=0.5)
    return merged.pred_boxes.tensor.tolist()


def test_a_part_goes_though_it_is_surer_and_of_another_class():
    part = instances_of([[85, 10, 99.5, 40]], [0.9], [7])
    whole = instances_of([[5, 10, 40, 40]], [0.3], [2])
    assert merge_pair(part, whole) == [[85, 10, 120, 40]]


def test_a_part_goes_where_the_other_tile_sees_nothing():
    part = instances_of([[85, 10, 100, 40]], [0.9], [7])
    assert merge_pair(part, instances_of([], [], [])) == []


def test_a_part_goes_if_most_of_it_lies_in_a_whole_box_of_another_tile():
    part = instances_of([[78, 10, 100, 40]], [0.9], [7])  # too wide for the second tile
    whole = instances_of([[4, 10, 40, 40]], [0.3], [2])
    assert merge_pair(part, whole) == [[84, 10, 120, 40]]
    # What the same tile has found is no better founded.
    both = instances_of([[78, 10, 100, 40], [70, 10, 96, 40]], [0.9, 0.8], [7, 2])
    nothing = instances_of([], [], [])
    assert merge_pair(both, nothing) == [[78, 10, 100, 40], [70, 10, 96, 40]]


def test_an_object_that_is_whole_in_no_tile_stays():
    part = instances_of([[30, 10, 100, 40]], [0.9], [7])
    rest = instances_of([[0, 10, 60, 40]], [0.8], [7])
    assert merge_pair(part, rest) == [[30, 10, 100, 40], [80, 10, 140, 40]]


def test_a_border_of_the_image_cuts_nothing():
    whole = instances_of([[0, 0, 30, 30], [60, 70, 75, 100]], [0.9, 0.8], [1, 1])
    assert merge_pair(whole, instances_of([], [], [])) == [[0, 0, 30, 30], [60, 70, 75, 100]]


def test_objects_in_both_tiles_are_found_once_in_each_class():
    first = instances_of([[84, 10, 96, 30], [84, 50, 96, 70]], [0.9, 0.5], [1, 1])
    second = instances_of([[4, 10, 16, 30.5], [4, 50, 16, 70]], [0.8, 0.6], [1, 2])
    assert merge_pair(first, second) == [[84, 10, 96, 30], [84, 50, 96, 70], [84, 50, 96, 70]]


def test_keypoints_and_masks_come_along():
    first = instances_of([[5, 6, 9, 9]], [0.5], [0])
    second = instances_of([[7, 1, 9, 3]], [0.6], [0])
    for instances, (x, y) in ((first, (6, 7)), (second, (8, 2))):
        instances.pred_keypoints = torch.tensor([[[x, y, 0.25]]], dtype=torch.float32)
        instances.pred_masks = torch.zeros(1, 100, 100, dtype=torch.bool)
        instances.pred_masks[0, y, x] = True
    merged = merge_tiles([first, second], PAIR, (100, 180), nms_threshold=0.5)
    assert merged.pred_keypoints.tolist() == [[[88, 2, 0.25]], [[6, 7, 0.25]]]
    assert merged.pred_masks.shape == (2, 100, 180)
    assert merged.pred_masks.nonzero().tolist() == [[0, 2, 88], [1, 7, 6]]
