"""The result of a large image, out of those of its tiles."""

import math
from collections.abc import Sequence

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..data.tiling import Tile

# A box of a detector that ends closer to the border of a tile than this part of its side, or than
# so many pixels, is taken to be cut by it.
_CUT_SHARE = 0.01
_CUT_PIXELS = 2.0


def merge_tiles(
    results: Sequence[Instances],
    tiles: Sequence[Tile],
    image_size: tuple[int, int],
    nms_threshold: float,
) -> Instances:
    """Make the result of an image from those of its tiles.

    A box that ends at the border of its tile, where the image goes on, may be a part of an object.
    It is dropped if another tile shows the whole place of it, for what that tile has found there is
    better founded, or if more than half of it lies in a whole box of another tile. What the
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
    counts = [len(instances) for instances in results]
    corners = [instances.pred_boxes.tensor for instances in results]
    all_boxes = torch.cat(
        [box + box.new_tensor(tile[:2] * 2) for box, tile in zip(corners, tiles, strict=True)]
    )
    owners = torch.arange(len(results)).repeat_interleave(torch.tensor(counts))
    scores = torch.cat([instances.scores for instances in results])
    classes = torch.cat([instances.pred_classes for instances in results])
    # Before the suppression, in which a part with a higher score would win over the whole.
    parts = _are_parts(all_boxes.cpu(), owners, [_inner(tile, image_size) for tile in tiles])
    kept = (~parts).nonzero()[:, 0].to(all_boxes.device)
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


def _inner(tile: Tile, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of a tile in which no box is cut, which is open at the image's border."""
    height, width = image_size
    x, y = (max(_CUT_PIXELS, _CUT_SHARE * side) for side in (tile.x1 - tile.x0, tile.y1 - tile.y0))
    return (
        tile.x0 + x if tile.x0 > 0 else -math.inf,
        tile.y0 + y if tile.y0 > 0 else -math.inf,
        tile.x1 - x if tile.x1 < width else math.inf,
        tile.y1 - y if tile.y1 < height else math.inf,
    )


def _are_within(boxes: Tensor, parts: Tensor) -> Tensor:
    return ((boxes[..., :2] > parts[..., :2]) & (boxes[..., 2:] < parts[..., 2:])).all(dim=-1)


def _are_parts(boxes: Tensor, owners: Tensor, inner: Sequence[Sequence[float]]) -> Tensor:
    """Tell which boxes are cut by the border of their tile and seen better by another one.

    The class does not count: a part of an object is often taken for another one.

    Args:
        boxes: (N, 4), in the image.
        owners: (N,) integer, their tiles.
        inner: of each tile the part in which no box is cut.

    Returns:
        Tensor: (N,) bool.
    """
    bounds = boxes.new_tensor(inner)
    cut = ~_are_within(boxes, bounds[owners])
    whole = boxes[~cut]
    areas = Boxes(boxes).area()
    parts = torch.zeros_like(cut)
    for index in cut.nonzero()[:, 0].tolist():
        box = boxes[index]
        shared = torch.minimum(whole[:, 2:], box[2:]) - torch.maximum(whole[:, :2], box[:2])
        shared = shared.clamp(min=0).prod(dim=1)
        in_whole = (shared > 0.5 * areas[index]) & (owners[~cut] != owners[index])
        parts[index] = _are_within(box, bounds).any() or in_whole.any()
    return parts
