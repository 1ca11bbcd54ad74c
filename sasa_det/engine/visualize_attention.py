"""Attention maps from a command line."""

import argparse
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..analysis.attention_figure import check_figure_path, draw_attention
from ..analysis.attention_maps import (
    AttentionMaps,
    attention_maps,
    find_attention_layer,
    require_attention_layers,
)
from ..command_line import add_config_arguments
from ..data.images import read_image
from ..data.mapper import model_input
from ..errors import UsageError
from ..export import is_exported
from .defaults import flush_denormals, log_to
from .outputs import check_output_file, explained
from .tasks import task_of
from .trained_model import load_trained_model

logger = logging.getLogger(__name__)

_EPILOG = """
Layers: stem; res2.0, res2.1 and so on; fpn.output3, fpn.p6; head.cls.0@p3, head.bbox.0@p3,
head.cls_score@p3 and head.bbox_pred@p3 at each level that the head serves. --layer list prints
those of the model. KEY VALUE pairs override the config of the model, as MODEL.DEVICE cpu.
"""


def visualize_attention_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_visualize_attention` takes."""
    parser = argparse.ArgumentParser(description=description, epilog=_EPILOG)
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="checkpoint of a detector, model_final.pth, or the config of published "
        "weights, such as Digits/retinanet_SASA.yaml",
    )
    parser.add_argument("--input", metavar="IMAGE", help="image file")
    parser.add_argument(
        "--layer", required=True, metavar="NAME", help="attention layer, or list to print all"
    )
    parser.add_argument(
        "--head", default="all", metavar="N", help="number of a head, from 0; all by default"
    )
    parser.add_argument(
        "--at",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="pixel of the image, from its left and upper border; its center by default",
    )
    parser.add_argument("--output", metavar="FILE", help="picture to write: .png, .pdf or .svg")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    add_config_arguments(parser)
    return parser


def run_visualize_attention(args: argparse.Namespace) -> None:
    """Draw attention maps as a command line of :func:`visualize_attention_parser` says.

    Raises:
        UsageError, CheckpointError, ImageError: in one sentence, before anything is written.
    """
    flush_denormals()
    log_to(None)
    listing = args.layer == "list"
    if not listing:
        missing = [f"--{name}" for name in ("input", "output") if not getattr(args, name)]
        if missing:
            raise UsageError(f"{' and '.join(missing)} must be given, unless --layer is list.")
        check_figure_path(args.output)
        check_output_file(args.output, overwrite=args.overwrite, inputs=(args.weights, args.input))
        if not os.path.isfile(args.input):
            raise UsageError(f"input {args.input} is not an image file.")
    if is_exported(args.weights):
        raise UsageError(
            f"{args.weights} was exported, and has no layers by name; give the checkpoint it is "
            "from."
        )
    trained = load_trained_model(args.weights, config_file=args.config_file, opts=args.opts)
    if listing:
        print("\n".join(require_attention_layers(trained.model)))
        return
    # Before the image, so that a wrong name costs no time.
    layer = find_attention_layer(trained.model, args.layer)
    heads = _heads(args.head, args.layer, layer.module.num_heads)
    mapper = task_of(trained.options).test_mapper()
    max_pixels = trained.options.max_pixels
    rgb = read_image(args.input, max_pixels, "RGB")
    height, width = rgb.shape[:2]
    at = (width / 2, height / 2) if args.at is None else tuple(args.at)
    image = read_image(args.input, max_pixels, mapper.image_format)
    maps = attention_maps(trained.model, model_input(image, mapper.augmentations), args.layer, at)
    with explained(args.output):
        draw_attention(maps, rgb, args.output, heads, source=Path(args.input).name)
    for head in heads:
        logger.info("%s", _description(maps, head))
    logger.info("Written to %s.", args.output)


def _heads(word: str, layer: str, number: int) -> Sequence[int]:
    """Return the heads that ``--head`` asks for."""
    if word == "all":
        return range(number)
    if re.fullmatch(r"-?\d+", word, re.ASCII) and 0 <= int(word) < number:
        return [int(word)]
    near = str(min(max(int(word), 0), number - 1)) if re.fullmatch(r"-?\d+", word) else "all"
    raise UsageError(
        f"layer {layer} has no head {word}: --head must be 0 to {number - 1} or all; did you mean "
        f"{near}?"
    )


def _description(maps: AttentionMaps, head: int) -> str:
    """Say where a head looks most, for the log."""
    side, reach = maps.kernel_size, maps.kernel_size // 2
    places = []
    for weights in (maps.weights[head], maps.mean[head]):
        row, column = divmod(int(weights.argmax()), side)
        places.append(f"{float(weights.max()):.0%} at ({row - reach:+d}, {column - reach:+d})")
    return (
        f"{maps.layer}, head {head}: the pixel's largest weight is {places[0]} (row, column); "
        f"the mean's {places[1]}."
    )
