"""A data set of large images cut into tiles, from a command line."""

import argparse
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..command_line import positive_int, refuse_existing, share, share_below_1
from ..data.coco import box_corners, check_coco, read_coco
from ..data.formats import without_sources
from ..data.images import MAX_PIXELS, check_size, read_image
from ..data.sources import open_data
from ..data.tiling import Tile, boxes_in_tile, tile_image, turn_boxes
from ..data.validation_report import summarize_warnings
from ..data_arguments import DataParser
from ..utils.files import whole_folder
from ..utils.text import printable
from .defaults import log_to
from .outputs import check_output_folder, explained

logger = logging.getLogger(__name__)

ANNOTATIONS, IMAGES = "annotations.json", "images"

_EPILOG = """
DIR/annotations.json and DIR/images are then what --train takes. Only boxes are cut: masks and
keypoints are left out.
"""


def tile_data_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_tile_data` takes."""
    parser = DataParser(description=description, epilog=_EPILOG)
    parser.add_data_argument("train", flag="--input", required=True)
    parser.add_argument(
        "--size",
        type=positive_int,
        required=True,
        metavar="PIXELS",
        help="height and width of the tiles; a shorter side of an image stays whole",
    )
    parser.add_argument(
        "--overlap",
        type=share_below_1,
        default=0.5,
        metavar="SHARE",
        help="share of a tile that the next one shows as well, %(default)s by default; objects "
        "that are smaller are whole in at least one tile",
    )
    parser.add_argument(
        "--min-visible",
        type=share,
        default=0.4,
        metavar="SHARE",
        help="leave an object out of tiles that show less of its area, %(default)s by default",
    )
    parser.add_argument(
        "--turns", action="store_true", help="write each tile also turned by 90, 180, 270 degrees"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        default=MAX_PIXELS,
        metavar="N",
        help="largest product of an image's height and width, %(default)s by default",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to make; it must not exist yet"
    )
    return parser


def run_tile_data(args: argparse.Namespace) -> None:
    """Cut a data set into tiles as a command line of :func:`tile_data_parser` says.

    Raises:
        UsageError, DatasetError, FileNotFoundError: in one sentence, before anything is written.
        ImageError: if an image cannot be read; nothing is left of what was written.
    """
    log_to(None)
    output = Path(args.output)
    refuse_existing(output)
    check_output_folder(output)
    json_file, image_root = open_data(*args.input)
    report = check_coco(json_file, image_root, max_pixels=args.max_pixels)
    for sentence in summarize_warnings(report):
        logger.warning(sentence)
    counts = write_tiles(
        json_file,
        image_root,
        output,
        lambda height, width: tile_image(height, width, args.size, args.overlap),
        min_visible=args.min_visible,
        turns=(0, 1, 2, 3) if args.turns else (0,),
        max_pixels=args.max_pixels,
    )
    if counts.had_more:
        logger.warning("Only boxes are cut: masks and keypoints are left out.")
    if counts.never_whole:
        logger.warning(
            "%d objects are whole in no tile, for they are larger than the overlap.",
            counts.never_whole,
        )
    logger.info(
        "Written to %s: %d tiles of %d images, with %d boxes of %d objects. To train on them, give "
        "--train %s %s",
        *(output, counts.tiles, counts.images, counts.boxes, counts.objects),
        *(output / ANNOTATIONS, output / IMAGES),
    )


class TileCounts(NamedTuple):
    """What :func:`write_tiles` has read and written.

    Attributes:
        images, objects: that were read.
        tiles, boxes: that were written.
        never_whole: objects that no tile shows whole.
        had_more: whether objects had masks or keypoints, which tiles do not have.
    """

    images: int
    objects: int
    tiles: int
    boxes: int
    never_whole: int
    had_more: bool


def write_tiles(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    place: Callable[[int, int], Sequence[Tile]],
    *,
    min_visible: float,
    turns: Sequence[int] = (0,),
    max_pixels: int = MAX_PIXELS,
    info: Mapping[str, Any] | None = None,
) -> TileCounts:
    """Write parts of the images of a data set as a data set, whole or not at all.

    Args:
        json_file, image_root: COCO json and image folder, which were checked.
        output: folder to make; it receives annotations.json and images/*.png.
        place: from height and width of an image to its parts.
        min_visible: least share of an object's area that a part must show for its box to be in the
            annotations. A crowd, which is not trained on, is kept wherever some of it is shown.
        turns: each part is written once for each number of turns by 90 degrees to the left.
        max_pixels: largest product of an image's height and width.
        info: what else the json says about itself, under "info".

    Raises:
        ImageError: if an image cannot be read or has another size than the json says.
        UsageError: if the folder cannot be written.
    """
    content = read_coco(json_file)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    places = [place(image["height"], image["width"]) for image in content["images"]]
    progress = tqdm(total=sum(map(len, places)) * len(turns), desc="Cutting", unit="tile")
    written = _Written(min_visible)
    with explained(output), whole_folder(output) as folder, progress:
        (folder / IMAGES).mkdir()
        for image, tiles in zip(content["images"], places, strict=True):
            path = os.path.join(image_root, image["file_name"])
            pixels = read_image(path, max_pixels, "RGB")
            check_size(path, pixels, (image["height"], image["width"]))
            for tile in tiles:
                for turned in turns:
                    name, part = written.add(image, by_image[image["id"]], tile, turned, pixels)
                    Image.fromarray(part).save(folder / IMAGES / name, compress_level=1)
                    progress.update()
        result = {
            "info": {**(info or {})},
            "licenses": content.get("licenses", []),
            "images": written.images,
            "annotations": written.annotations,
            "categories": without_sources(content["categories"]),
        }
        (folder / ANNOTATIONS).write_text(json.dumps(result), encoding="utf-8")
    return TileCounts(
        images=len(content["images"]),
        objects=len(content["annotations"]),
        tiles=len(written.images),
        boxes=len(written.annotations),
        never_whole=len(content["annotations"]) - len(written.whole),
        had_more=any(
            annotation.get("segmentation") or annotation.get("keypoints")
            for annotation in content["annotations"]
        ),
    )


class _Written:
    """The entries of the json, and which objects a tile shows whole."""

    def __init__(self, min_visible: float):
        self._min_visible = min_visible
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.whole: set[int] = set()

    def add(
        self,
        image: Mapping[str, Any],
        annotations: Sequence[Mapping[str, Any]],
        tile: Tile,
        turns: int,
        pixels: np.ndarray,
    ) -> tuple[str, np.ndarray]:
        """Add a tile with its objects; return the name of its file and its pixels."""
        part = pixels[tile.y0 : tile.y1, tile.x0 : tile.x1]
        # The id, for images of several folders may have the same name.
        stem = printable(f"{image['id']}_{Path(image['file_name']).stem}")
        name = f"{stem}_{tile.x0}_{tile.y0}{f'_{90 * turns}' if turns else ''}.png"
        height, width = pixels.shape[:2]
        corners = box_corners(annotations).clip(0, (width, height) * 2)
        boxes, shares = boxes_in_tile(corners, tile)
        boxes = turn_boxes(boxes, part.shape[:2], turns)
        part = np.ascontiguousarray(np.rot90(part, turns))
        identity = len(self.images) + 1
        height, width = part.shape[:2]
        self.images.append({"id": identity, "file_name": name, "height": height, "width": width})
        for annotation, box, visible in zip(annotations, boxes.tolist(), shares, strict=True):
            is_crowd = annotation.get("iscrowd", 0)
            if visible == 1:
                self.whole.add(annotation["id"])
            if visible == 0 or (visible < self._min_visible and not is_crowd):
                continue
            x0, y0, x1, y1 = box
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": identity,
                    "category_id": annotation["category_id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": is_crowd,
                }
            )
        return name, part
