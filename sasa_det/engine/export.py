"""Export from a command line: a checkpoint in, a file that runs without this package out."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate
from torch import Tensor, nn

from .. import __version__
from ..command_line import add_config_arguments
from ..config.load import register_datasets
from ..config.options import RunOptions
from ..data.images import read_image
from ..data.mapper import model_input
from ..data_arguments import DataParser
from ..errors import UsageError, nearest
from ..export import FORMATS, ExportedModel, export_model, is_exported, need, read_exported
from .defaults import log_to
from .outputs import check_output_file, explained
from .tasks import task_of
from .trained_model import TrainedModel, load_trained_model
from .trainer import Trainer

logger = logging.getLogger(__name__)

_EPILOG = """
KEY VALUE pairs override the config of the model, as MODEL.RETINANET.SCORE_THRESH_TEST 0.3, and come
last. Exit status: 0, or 2 if there is a mistake in the command or the weights.
"""


def export_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_export` takes."""
    parser = DataParser(description=description, epilog=_EPILOG)
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="checkpoint of a detector or classifier, model_final.pth, or the config of published "
        "weights, such as Digits/retinanet_SASA.yaml",
    )
    parser.add_argument(
        "--format",
        required=True,
        metavar="FORMAT",
        help=f"of the file: {', '.join(FORMATS)}",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the file")
    parser.add_argument(
        "--sample-image",
        metavar="FILE",
        help="image that the model is traced with, noise by default; an R-CNN should find objects "
        "in it",
    )
    parser.add_argument(
        "--input-size",
        nargs="+",
        metavar=("H W", "dynamic"),
        help="height and width of the only images that the file takes; by default, dynamic: any "
        "of at least 32 pixels",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="give features, logits and deltas of boxes instead of boxes, scores and classes",
    )
    parser.add_argument(
        "--run-eval",
        action="store_true",
        help="evaluate the checkpoint and the file on the config's test set, and compare them",
    )
    parser.add_data_argument("test")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file if it exists already"
    )
    add_config_arguments(parser)
    return parser


def run_export(args: argparse.Namespace) -> int:
    """Export as a command line of :func:`export_parser` says.

    Returns:
        int: exit status, 0.

    Raises:
        UsageError, CheckpointError, DatasetError: in one sentence; a file is whole or not there.
    """
    log_to(None)
    if args.format not in FORMATS:
        raise UsageError(
            f"--format must be one of {', '.join(FORMATS)}, got {args.format!r}"
            f"{nearest(args.format, FORMATS)}"
        )
    path = Path(args.output, f"model{FORMATS[args.format]}")
    check_output_file(path, overwrite=args.overwrite, inputs=[args.weights])
    if args.format == "onnx":
        need("onnx", "the format onnx")
        need("onnxruntime", "the format onnx")
    if args.run_eval and args.raw:
        raise UsageError("--run-eval needs boxes or scores; leave --raw out.")
    if args.test and not args.run_eval:
        raise UsageError("--test is for --run-eval.")
    if is_exported(args.weights):
        raise UsageError(f"{args.weights} was exported already; give the checkpoint it is from.")
    size, opts = _input_size(args)
    trained = load_trained_model(
        args.weights, config_file=args.config_file, opts=opts, classifiers=True
    )
    trained.model.cpu()
    tested = _test_options(trained.options, args) if args.run_eval else None
    image = _sample(trained, args.sample_image, size)
    logger.info("Exporting as %s; this takes up to a few minutes.", args.format)
    with explained(path):
        export_model(
            trained.model,
            image,
            path,
            args.format,
            facts=facts_of(trained),
            dynamic=size is None,
            raw=args.raw,
        )
    logger.info("Written to %s (%.1f MB).", path, path.stat().st_size / 1e6)
    if args.raw:
        return 0
    exported = read_exported(path)
    if tested is not None:
        print(_comparison(trained.model, exported, tested))
    return 0


def facts_of(trained: TrainedModel) -> dict[str, Any]:
    """Return what a file is to hold about a model: classes, preprocessing, thresholds, config."""
    model, facts = trained.model, {}
    for name, fact in (
        ("test_score_thresh", "score_threshold"),
        ("test_nms_thresh", "nms_threshold"),
        ("max_detections_per_image", "max_detections"),
        ("test_topk_per_image", "max_detections"),
    ):
        values = [getattr(part, name) for part in model.modules() if hasattr(part, name)]
        if values:
            facts[fact] = values[-1]
    return {
        "sasa_det": __version__,
        "model": type(model).__name__,
        "classes": trained.class_names,
        "category_ids": trained.category_ids,
        "image_format": trained.options.image_format,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "config": trained.options.dump(),
        **facts,
    }


def _input_size(args: argparse.Namespace) -> tuple[tuple[int, int] | None, list[str]]:
    """Return the size of images, None for all, and the overrides, which may stand behind it."""
    words = args.input_size or ["dynamic"]
    if words[0] == "dynamic":
        return None, [*words[1:], *args.opts]
    numbers = [word for word in words[:2] if word.isascii() and word.isdigit() and int(word) >= 32]
    if len(numbers) < 2:
        raise UsageError(
            "--input-size must be height and width in pixels, at least 32, or dynamic, got "
            f"{' '.join(words[:2])}."
        )
    return (int(numbers[0]), int(numbers[1])), [*words[2:], *args.opts]


def _sample(trained: TrainedModel, file: str | None, size: tuple[int, int] | None) -> Tensor:
    options = trained.options
    is_classifier = options.meta_architecture == "Classifier"
    if is_classifier and size is None:
        size = (options.config.INPUT.CLASSIFICATION.CROP_SIZE,) * 2
    if file is None:
        generator = torch.Generator().manual_seed(0)
        channels = trained.model.pixel_mean.shape[0]
        return 255 * torch.rand(channels, *(size or (480, 640)), generator=generator)
    image = read_image(os.fspath(file), options.max_pixels, options.image_format)
    if is_classifier:
        image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    else:
        image = model_input(image, task_of(options).test_mapper().augmentations)["image"]
    image = image.float()
    if size is not None:
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return image


def _test_options(options: RunOptions, args: argparse.Namespace) -> RunOptions:
    """Return options with the data to test on, registered."""
    if args.test:
        path, where = [*args.test, ""][:2]
        options = options.replace(test_json=path, test_images=where)
        options = options.replace(test=register_datasets(options)["test"])
    for name in options.test or ("",):
        if name not in DatasetCatalog:
            raise UsageError(
                f"--run-eval needs data to test on, and {name or 'none'} is not registered: give "
                "--test."
            )
    folder = os.path.join(args.output, "evaluation")
    options = options.replace(output_dir=folder, device="cpu")
    task_of(options).check_data(options.test, training=False)
    return options


def _comparison(model: nn.Module, exported: ExportedModel, options: RunOptions) -> str:
    """Evaluate a model and what it was exported to, and return a table of both."""
    columns = []
    for name, each in (("checkpoint", model), ("exported", exported)):
        logger.info("Evaluating the %s model.", name)
        folder = os.path.join(options.output_dir, name)
        results = Trainer.test(options.replace(output_dir=folder).config, each)
        columns.append(flatten_results_dict(results))
    rows = [(metric, *(column.get(metric) for column in columns)) for metric in columns[0]]
    return tabulate(rows, headers=("metric", "checkpoint", "exported"), floatfmt=".3f")
