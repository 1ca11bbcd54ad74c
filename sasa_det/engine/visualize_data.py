"""Pictures of a data set, as it is annotated and as it is trained on, from a command line."""

import argparse
import logging
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, detection_utils
from PIL import Image
from tqdm import tqdm

from ..command_line import positive_int
from ..config.lazy import load_lazy_config
from ..config.load import load_config
from ..config.options import RunOptions
from ..data.images import read_image
from ..data_arguments import DataParser
from ..errors import ImageError, UsageError
from ..evaluation.drawing import enlarged, enlarged_visualizer
from ..utils.files import whole_file
from ..utils.text import without_formulas
from .defaults import flush_denormals, log_to
from .outputs import check_output_folder, explained
from .tasks import task_of

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def visualize_data_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_visualize_data` takes."""
    parser = DataParser(description=description)
    parser.add_argument(
        "--source",
        required=True,
        choices=("annotation", "dataloader"),
        help="draw the annotated images, or what the model is trained on, after augmentation",
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="config of a training; a LazyConfig is executed",
    )
    data = parser.add_mutually_exclusive_group()
    for split in ("train", "test"):
        parser.add_data_argument(split, data)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder for pictures")
    parser.add_argument(
        "--num-images",
        type=positive_int,
        metavar="N",
        help="how many pictures to draw; by default, as many as the data set has images",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that exist")
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="overrides of the config"
    )
    return parser


def run_visualize_data(args: argparse.Namespace) -> None:
    """Draw a data set as a command line of :func:`visualize_data_parser` says.

    Raises:
        UsageError, DatasetError, FileNotFoundError: in one sentence, before anything is written.
        ImageError: if an image cannot be read that is to be trained on; those of ``--source
            annotation`` are named and skipped.
    """
    flush_denormals()
    log_to(None)
    check_output_folder(args.output_dir, overwrite=args.overwrite)
    is_training = args.source == "dataloader"
    if is_training and args.test:
        raise UsageError("--source dataloader draws what is trained on: give --train, not --test.")
    options = _options(args)
    names = options.test if args.test else options.train
    if not names:
        raise UsageError(
            "there is no data set to draw: give --train or --test, or a config that names one."
        )
    task = task_of(options)
    if "coco" not in task.evaluator_types:
        raise UsageError(f"{args.config_file} is of a classifier, whose images have no boxes.")
    task.check_data(names, training=is_training)
    records = [(record, name) for name in names for record in DatasetCatalog.get(name)]
    number = min(args.num_images or len(records), len(records))
    if is_training:
        task.check_mapper(True)
        number = args.num_images or len(records)
        pictures = _trained_on(task, options.image_format, names[0])
    else:
        pictures = _annotated(records, options.max_pixels)
    output = Path(args.output_dir)
    inputs = {os.path.realpath(record["file_name"]) for record, _ in records}
    drawn = 0
    for name, picture in tqdm(islice(pictures, number), total=number, desc="Drawing", unit="image"):
        path = output / name
        if os.path.realpath(path) in inputs:
            raise UsageError(f"output {path} is an image of the data set.")
        with explained(path), whole_file(path) as part:
            Image.fromarray(picture).save(part)
        drawn += 1
    logger.info("%d pictures written to %s.", drawn, output)


def _options(args: argparse.Namespace) -> RunOptions:
    if args.config_file.endswith(".py"):
        return load_lazy_config(args.config_file, args.opts, args.train, args.test)
    return RunOptions.read(load_config(args.config_file, args.opts, args.train, args.test))


def _annotated(
    records: list[tuple[dict[str, Any], str]], max_pixels: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names of pictures and pictures of records, each with its data set's name."""
    for record, name in records:
        try:
            image = read_image(record["file_name"], max_pixels, "RGB")
        except ImageError as error:
            logger.warning("Skipped: %s", error)
            continue
        yield picture_name(record, name), draw_record(image, record, MetadataCatalog.get(name))


def draw_record(image: np.ndarray, record: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the annotations of an image with detectron2's Visualizer.

    Args:
        image: (H, W, 3) uint8, RGB.
        record: of the data set; of one without annotations, the image alone is in the picture.
        metadata: of the data set.

    Returns:
        numpy.ndarray: (s H, s W, 3) uint8, RGB, with the integer s of
        :func:`sasa_det.evaluation.drawing.enlarged_visualizer`.
    """
    if not record.get("annotations"):
        return enlarged(image)
    classes = [without_formulas(name) for name in metadata.get("thing_classes", ())]
    shown = Metadata(thing_classes=classes)
    for key in ("keypoint_names", "keypoint_connection_rules"):
        if (value := metadata.get(key)) is not None:
            shown.set(**{key: value})
    return enlarged_visualizer(image, shown).draw_dataset_dict(record).get_image()


def picture_name(record: dict[str, Any], dataset: str) -> str:
    """Return where a picture is written: as the image in its folder, so that none has two."""
    root = MetadataCatalog.get(dataset).get("image_root")
    name = os.path.relpath(record["file_name"], root) if root else ""
    if not name or name.startswith(".."):
        name = os.path.basename(record["file_name"])
    return name if Path(name).suffix.lower() in PICTURE_SUFFIXES else f"{name}.png"


def _trained_on(task: Any, image_format: str, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pictures of what the training loader gives, in its order."""
    classes = [
        without_formulas(name) for name in MetadataCatalog.get(name).get("thing_classes", ())
    ]
    for index, sample in enumerate(chain.from_iterable(task.train_loader())):
        image = sample["image"].permute(1, 2, 0)
        image = detection_utils.convert_image_to_rgb(image.numpy(), image_format)
        instances = sample["instances"]
        fields = instances.get_fields()
        numbers = instances.gt_classes.tolist()
        drawn = enlarged_visualizer(image, Metadata()).overlay_instances(
            labels=[classes[i] if i < len(classes) else str(i) for i in numbers],
            boxes=fields["gt_boxes"],
            masks=fields.get("gt_masks"),
            keypoints=fields.get("gt_keypoints"),
        )
        yield f"{index:06d}_{Path(sample['file_name']).stem}.png", drawn.get_image()
