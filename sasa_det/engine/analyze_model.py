"""Counts of parameters and FLOPs from a command line, of a model or of the paper's models."""

import argparse
from pathlib import Path

from ..analysis.complexity import count_config, default_image_size, parts_report
from ..analysis.paper import draw_figure_5, paper_report
from ..analysis.san_paper import san_paper_report
from ..command_line import positive_int
from ..config.load import load_config
from ..config_files import CONFIGS
from ..errors import UsageError
from .defaults import log_to


def analyze_model_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_analyze_model` takes."""
    parser = argparse.ArgumentParser(description=description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config-file", metavar="FILE", help="tabulate the model of this config, part by part"
    )
    what.add_argument(
        "--paper",
        action="store_true",
        help="tabulate Tables 1 to 7 of the paper, Figure 5's widths and the models of SAN's paper "
        "beside what is counted",
    )
    what.add_argument(
        "--figure",
        type=int,
        choices=(5,),
        help="draw top-1 accuracies against FLOPs and against parameters, and tabulate them: those "
        "the paper prints for its ResNets, and those of --results",
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="with --config-file: size of the image in pixels; by default a classifier's crop, and "
        "640 640 for other models",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="with --figure: top-1 accuracies to draw, in percent, as in "
        '{"table1_R50_full": 77.6, "my/config.yaml": 70.1}; a name is that of a config in '
        "configs/Ablations",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default="output/figure5.png",
        metavar="FILE.png",
        help="with --figure: the picture to write, %(default)s by default",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --figure: replace the picture if it exists"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        help="with --config-file: config overrides, KEY VALUE pairs",
    )
    return parser


def run_analyze_model(args: argparse.Namespace) -> None:
    """Count as a command line of :func:`analyze_model_parser` says.

    Raises:
        UsageError: in one sentence.
    """
    log_to(None)
    if not args.config_file and (args.size or args.opts):
        raise UsageError("--size and config overrides need --config-file.")
    if not args.figure and (args.results or args.overwrite):
        raise UsageError("--results and --overwrite need --figure.")
    if args.paper:
        print(f"{paper_report(CONFIGS)}\n\n{san_paper_report(CONFIGS)}")
    elif args.figure:
        print(draw_figure_5(CONFIGS, args.output, args.results, overwrite=args.overwrite))
        print(f"\nPicture: {args.output}")
    else:
        cfg = load_config(args.config_file, args.opts)
        size = args.size or default_image_size(cfg)
        print(parts_report(count_config(cfg, *size), *size))
