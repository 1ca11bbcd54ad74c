"""Annotations in other formats written as a COCO json, from a command line."""

import argparse
import json
import logging
import os
from functools import partial
from pathlib import Path

from ..data.coco import read_coco
from ..data.formats import read_cvat, read_labelme, without_sources
from ..data.sources import open_converted, open_data, reading_of
from ..data.validation import validate_coco
from ..data.validation_report import describe_report
from ..data_arguments import data_format
from ..errors import DatasetError, UsageError
from ..utils.files import write_text
from .defaults import log_to
from .outputs import check_output_file, explained

logger = logging.getLogger(__name__)

# What --input must be.
_INPUTS = {
    "yolo": "a data.yaml",
    "voc": "a folder",
    "labelme": "a folder of json files",
    "cvat": "the XML file of an export as CVAT for images",
}


def convert_data_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_convert_data` takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--from", required=True, dest="source_format", choices=_INPUTS, help="format to read"
    )
    parser.add_argument("--to", default="coco", choices=["coco"], help="format to write")
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="; ".join(f"{name}: {what}" for name, what in _INPUTS.items()),
    )
    parser.add_argument(
        "--split", default="", help="split of a YOLO or Pascal VOC data set, train by default"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="json file to write")
    parser.add_argument("--all", action="store_true", help="list every problem and every class")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def run_convert_data(args: argparse.Namespace) -> None:
    """Convert annotations as a command line of :func:`convert_data_parser` says.

    Raises:
        UsageError, DatasetError, FileNotFoundError: in one sentence, before anything is written.
    """
    log_to(None)
    check_output_file(args.output, overwrite=args.overwrite, inputs=[args.input])
    name, image_root = _open(args)
    reading = reading_of(name)
    check_output_file(args.output, overwrite=True, inputs=reading.sources)
    report = validate_coco(name, image_root, limit=None if args.all else 5)
    if report.counts:
        print(describe_report(report, everything=args.all))
    if kinds := report.kinds("error"):
        first = next(problem for problem in report.problems if problem.kind in kinds)
        number = report.count("error")
        rest = f" (and {number - 1:,} more errors, listed above)" if number > 1 else ""
        raise DatasetError(f"{name} is not converted: {first.message}{rest}")
    content = read_coco(name)
    for section in ("images", "annotations", "categories"):
        content[section] = without_sources(content[section])
    with explained(args.output):
        write_text(args.output, json.dumps(content))
    logger.info(
        "Written to %s: images: %d, objects: %d, classes: %d. To train on it, give --train %s %s",
        args.output,
        report.num_images,
        report.num_annotations,
        len(report.categories),
        args.output,
        image_root,
    )


def _open(args: argparse.Namespace) -> tuple[str, str]:
    path = args.input
    if args.source_format in ("labelme", "cvat"):
        if args.split:
            raise UsageError("--split is for YOLO and Pascal VOC.")
        read = read_labelme if args.source_format == "labelme" else read_cvat
        return open_converted(f"{path.rstrip(os.sep)}:all", partial(read, path))
    if Path(path).exists() and data_format(path) != args.source_format:
        raise UsageError(
            f"--input {path} must be {_INPUTS[args.source_format]} with --from "
            f"{args.source_format}."
        )
    return open_data(path, args.split)
