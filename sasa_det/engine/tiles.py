"""Large images in tiles: where they lie, and one result out of theirs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

# A box of a detector that ends closer to the border of a tile than this part of its side, or than
# so many pixels, is taken to be cut by it.
_CUT_SHARE = 0.01
_CUT_PIXELS = 2.0


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def tile_image(height: int, width: int, size: int, overlap: float) -> list[Tile]:
    """Cover an image with tiles.

    All tiles have the same size, for the last ones end at the border of the image and overlap more.

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


def merge_tiles(
    results: Sequence[Instances],
    tiles: Sequence[Tile],
    image_size: tuple[int, int],
    nms_threshold: float,
) -> Instances:
    """Make the result of an image from those of its tiles.

    A box that ends at the border of its tile, where the image goes on, may be a part of an object.
    It is dropped if more than half of it lies in the whole box that another tile has. What the
    remaining boxes of a class have in common is reduced by non-maximum suppression.

    Args:
        results: of the tiles, in pixels of the tile, with "pred_boxes", "scores", "pred_classes"
            and, of some detectors, "pred_masks" and "pred_keypoints".
        tiles: where they lie.
        image_size: height and width of the image.
        nms_threshold: boxes of a class with more IoU than this are taken to be of one object.

    Returns:
        Instances: in pixels of the image, in the order of their scores.
    """
    boxes, cut = [], []
    for instances, tile in zip(results, tiles, strict=True):
        corners = instances.pred_boxes.tensor
        boxes.append(corners + corners.new_tensor((tile.x0, tile.y0, tile.x0, tile.y0)))
        cut.append(_is_cut(corners, tile, image_size))
    all_boxes, all_cut = torch.cat(boxes), torch.cat(cut)
    counts = [len(instances) for instances in results]
    owners = torch.arange(len(results)).repeat_interleave(torch.tensor(counts))
    scores = torch.cat([instances.scores for instances in results])
    classes = torch.cat([instances.pred_classes for instances in results])
    # Before the suppression, in which a part with a higher score would win over the whole.
    kept = (~_are_parts(all_boxes, all_cut, owners.to(all_boxes.device))).nonzero()[:, 0]
    kept = kept[batched_nms(all_boxes[kept], scores[kept], classes[kept], nms_threshold)]
    merged = Instances(image_size)
    merged.pred_boxes, merged.scores = Boxes(all_boxes[kept]), scores[kept]
    merged.pred_classes = classes[kept]
    first = results[0]
    if first.has("pred_keypoints"):
        keypoints = [instances.pred_keypoints.clone() for instances in results]
        for points, tile in zip(keypoints, tiles, strict=True):
            points[:, :, :2] += points.new_tensor((tile.x0, tile.y0))
        merged.pred_keypoints = torch.cat(keypoints)[kept]
    if first.has("pred_masks"):
        starts = torch.tensor([0, *counts]).cumsum(0)
        merged.pred_masks = first.pred_masks.new_zeros((len(kept), *image_size))
        for mask, index in zip(merged.pred_masks, kept.cpu(), strict=True):
            owner = int(owners[index])
            tile = tiles[owner]
            part = results[owner].pred_masks[index - starts[owner]]
            mask[tile.y0 : tile.y1, tile.x0 : tile.x1] = part
    return merged


def _is_cut(boxes: Tensor, tile: Tile, image_size: tuple[int, int]) -> Tensor:
    """Tell which boxes of a tile end at a border that is not the image's; (N,) bool."""
    height, width = image_size
    sizes = (tile.x1 - tile.x0, tile.y1 - tile.y0)
    near = [max(_CUT_PIXELS, _CUT_SHARE * size) for size in sizes]
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if tile.x0 > 0:
        cut |= boxes[:, 0] <= near[0]
    if tile.y0 > 0:
        cut |= boxes[:, 1] <= near[1]
    if tile.x1 < width:
        cut |= boxes[:, 2] >= sizes[0] - near[0]
    if tile.y1 < height:
        cut |= boxes[:, 3] >= sizes[1] - near[1]
    return cut


def _are_parts(boxes: Tensor, cut: Tensor, owners: Tensor) -> Tensor:
    """Tell which boxes are cut and lie for the most part in a whole one of another tile.

    The class does not count: a part of an object is often taken for another one, and the tile that
    has the whole object sees the place of its part better.
    """
    parts = torch.zeros_like(cut)
    whole = boxes[~cut], owners[~cut]
    areas = Boxes(boxes).area()
    for index in cut.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = boxes[index]
        others = whole[0][whole[1] != owners[index]]
        width = torch.minimum(others[:, 2], x1) - torch.maximum(others[:, 0], x0)
        height = torch.minimum(others[:, 3], y1) - torch.maximum(others[:, 1], y0)
        shared = width.clamp(min=0) * height.clamp(min=0)
        parts[index] = bool((shared > 0.5 * areas[index]).any())
    return parts
