"""Pictures of COCO results beside the annotations, from a command line."""

import argparse
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_masks
from tqdm import tqdm

from ..analysis.results import read_detections
from ..command_line import share
from ..data.catalog import metadata_of
from ..data.coco import box_corners, check_coco, load_coco
from ..data.images import MAX_PIXELS, read_image
from ..data.sources import open_data
from ..data_arguments import DataParser
from ..errors import UsageError
from ..evaluation.drawing import draw_instances
from ..utils.files import whole_file
from .defaults import log_to
from .outputs import check_output_folder, explained
from .visualize_data import draw_record, picture_name

logger = logging.getLogger(__name__)


def visualize_json_results_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_visualize_json_results` takes."""
    parser = DataParser(description=description)
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="COCO results, coco_instances_results.json"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for pictures")
    data = parser.add_mutually_exclusive_group(required=True)
    parser.add_data_argument("test", data)
    data.add_argument("--dataset", metavar="NAME", help="registered data set, such as digits_val")
    parser.add_argument(
        "--conf-threshold",
        type=share,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn, %(default)s by default",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that exist")
    return parser


def run_visualize_json_results(args: argparse.Namespace) -> None:
    """Draw results as a command line of :func:`visualize_json_results_parser` says.

    Each picture has the detections on the left and the annotations on the right.

    Raises:
        UsageError, DatasetError, FileNotFoundError: in one sentence, before anything is written.
        ImageError: if an image cannot be read.
    """
    log_to(None)
    check_output_folder(args.output, overwrite=args.overwrite, inputs=[args.input])
    if args.test:
        json_file, image_root = open_data(*args.test, use="test")
    else:
        json_file, image_root = _files_of(args.dataset)
    check_coco(json_file, image_root, training=False)
    detections = read_detections(args.input, json_file)
    name = f"results of {json_file}"
    MetadataCatalog.get(name).image_root = image_root
    records = load_coco(json_file, image_root, name)
    metadata = MetadataCatalog.get(name)
    index = metadata.thing_dataset_id_to_contiguous_id
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in detections.results:
        if result["score"] >= args.conf_threshold:
            found[result["image_id"]].append(result)
    output = Path(args.output)
    inputs = {os.path.realpath(record["file_name"]) for record in records}
    for record in tqdm(records, desc="Drawing", unit="image"):
        path = output / picture_name(record, name)
        if os.path.realpath(path) in inputs:
            raise UsageError(f"output {path} is an image of the data set.")
        image = read_image(record["file_name"], MAX_PIXELS, "RGB")
        instances = _instances(found[record["image_id"]], index, image.shape[:2])
        left = draw_instances(image, instances, metadata.thing_classes.__getitem__)
        picture = np.concatenate([left, draw_record(image, record, metadata)], axis=1)
        with explained(path), whole_file(path) as part:
            Image.fromarray(picture).save(part)
    logger.info("%d pictures written to %s.", len(records), output)


def _files_of(dataset: str) -> tuple[str, str]:
    """Return the json and the image folder of a registered data set."""
    metadata = metadata_of(dataset)
    files = metadata.get("json_file"), metadata.get("image_root")
    if None in files:
        raise UsageError(f"data set {dataset} has no COCO json: give it with --test.")
    return files


def _instances(
    results: list[dict[str, Any]], index: dict[int, int], size: tuple[int, int]
) -> Instances:
    results = sorted(results, key=lambda result: -result["score"])
    instances = Instances(size)
    instances.pred_boxes = Boxes(box_corners(results))
    instances.scores = torch.tensor([result["score"] for result in results])
    instances.pred_classes = torch.tensor(
        [index[result["category_id"]] for result in results], dtype=torch.long
    )
    masks = [result.get("segmentation") for result in results]
    if masks and all(isinstance(mask, dict) and mask.get("size") == list(size) for mask in masks):
        instances.pred_masks = torch.from_numpy(
            np.stack([coco_masks.decode(mask) for mask in masks]).astype(bool)
        )
    return instances
