"""The analysis of detections from a command line."""

import argparse
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from ..analysis.results import Detections, analyze_results, read_detections
from ..analysis.results_figures import (
    draw_classes,
    draw_confusion,
    draw_errors,
    draw_precision_recall,
)
from ..command_line import positive_int, share
from ..data.coco import box_corners, check_coco
from ..data.images import MAX_PIXELS, read_image
from ..data.sources import open_data
from ..data_arguments import DataParser
from ..evaluation.drawing import draw_detections
from ..utils.files import write_text
from .defaults import log_to
from .outputs import check_output_folder, explained

logger = logging.getLogger(__name__)

_FIGURES = {
    "precision_recall.png": draw_precision_recall,
    "classes.png": draw_classes,
    "confusion.png": draw_confusion,
    "errors.png": draw_errors,
}

_NUMBERS, _WORST = "results.json", "worst_images.png"


def analyze_results_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_analyze_results` takes."""
    parser = DataParser(description=description)
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        help="COCO results with boxes: coco_instances_results.json of an evaluation, or what "
        "sasa-det predict --test wrote with --confidence-threshold 0.05",
    )
    parser.add_data_argument("test", required=True)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for numbers and pictures"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=share,
        default=0.5,
        metavar="SCORE",
        help="lowest score in the confusion matrix and the worst images, %(default)s by default",
    )
    parser.add_argument(
        "--max-detections",
        type=positive_int,
        default=100,
        metavar="N",
        help="how many detections of a class are counted in an image, those with the highest "
        "scores; COCO's %(default)s by default. Evaluation counts TEST.DETECTIONS_PER_IMAGE",
    )
    parser.add_argument(
        "--num-images",
        type=positive_int,
        default=8,
        metavar="N",
        help="how many of the worst images are drawn, %(default)s by default",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier analysis"
    )
    return parser


def run_analyze_results(args: argparse.Namespace) -> None:
    """Analyze detections as a command line of :func:`analyze_results_parser` says.

    Raises:
        UsageError, DatasetError, FileNotFoundError: in one sentence, before anything is written.
    """
    log_to(None)
    json_file, image_root = open_data(*args.test, use="test")
    check_output_folder(
        args.output,
        [_NUMBERS, _WORST, *_FIGURES],
        overwrite=args.overwrite,
        inputs=[args.predictions, args.test[0]],
    )
    check_coco(json_file, image_root, training=False)
    detections = read_detections(args.predictions, json_file)
    _warn_of_more(detections, args.max_detections)
    results = analyze_results(
        detections,
        score_threshold=args.confidence_threshold,
        max_detections=args.max_detections,
    )
    # Read before anything is written, for a file may be broken.
    worst = _worst_samples(detections, results, image_root, args.num_images)
    output = Path(args.output)
    with explained(output):
        write_text(output / _NUMBERS, json.dumps(results, indent=1))
        for name, draw in tqdm(_FIGURES.items(), desc="Figures", unit="figure"):
            draw(results, output / name)
        if worst:
            names = [category["name"] for category in detections.categories]
            draw_detections(
                worst, output / _WORST, names, score_threshold=args.confidence_threshold, columns=2
            )
    print(_summary(results))
    logger.info("Written to %s.", output)


def _warn_of_more(detections: Detections, counted: int) -> None:
    """Say if an image has more objects or detections of a class than are counted."""
    names = {category["id"]: category["name"] for category in detections.categories}
    for what, entries in (
        ("objects", detections.truth["annotations"]),
        ("detections", detections.results),
    ):
        numbers = Counter((entry["image_id"], entry["category_id"]) for entry in entries)
        if not numbers:
            continue
        (image, category), most = max(numbers.items(), key=lambda item: item[1])
        if most > counted:
            logger.warning(
                "The image %s has %d %s of %s, and the best %d detections of a class in an image "
                "are counted; --max-detections counts more.",
                *(image, most, what, names[category], counted),
            )


def _worst_samples(
    detections: Detections, results: Mapping[str, Any], image_root: str, number: int
) -> list[dict[str, Any]]:
    """Read the worst images that have an error, and gather what is drawn into them."""
    index = {category["id"]: i for i, category in enumerate(detections.categories)}
    objects, found = defaultdict(list), defaultdict(list)
    for entry in detections.truth["annotations"]:
        if not entry.get("iscrowd", 0):
            objects[entry["image_id"]].append(entry)
    for result in detections.results:
        found[result["image_id"]].append(result)

    def classes(entries: list[dict[str, Any]]) -> list[int]:
        return [index[entry["category_id"]] for entry in entries]

    wrong = [image for image in results["images"] if image["wrong"] or image["missed"]][:number]
    samples = []
    for image in tqdm(wrong, desc="Worst images", unit="image"):
        truth, detected = objects[image["id"]], found[image["id"]]
        samples.append(
            {
                "image": read_image(str(Path(image_root, image["file_name"])), MAX_PIXELS, "RGB"),
                "gt_boxes": box_corners(truth),
                "gt_classes": classes(truth),
                "boxes": box_corners(detected),
                "scores": [result["score"] for result in detected],
                "classes": np.array(classes(detected), dtype=int),
            }
        )
    return samples


def _summary(results: Mapping[str, Any]) -> str:
    """Return tables for a terminal."""

    def cell(value: float | None) -> str:
        return "none" if value is None else f"{value:.1f}"

    sizes = {"all": results["metrics"], **results["by_size"]}
    by_size = [
        [size, *(cell(row[key]) for key in ("AP", "AP50", "AR"))] for size, row in sizes.items()
    ]
    errors = [
        [name, f"{row['count']:,}", f"+{row['AP50']:.1f}"]
        for name, row in results["errors"]["types"].items()
    ]
    style = {"tablefmt": "github", "disable_numparse": True}
    tables = (
        tabulate(by_size, ["size", "AP", "AP50", "AR"], **style),
        tabulate(errors, ["error", "count", "AP50 it would give back"], **style),
    )
    return "\n" + "\n\n".join(tables) + "\n"
