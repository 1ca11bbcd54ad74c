"""Conversion of checkpoints from a command line."""

import argparse

from ..checkpoint.convert import WEIGHTS, build_target, convert_checkpoint
from ..command_line import IntermixedParser
from ..errors import TransferError, UsageError
from .defaults import log_to

_EPILOG = """
The backbone is that of the model of --config-file or, by default, of the config that SOURCE holds;
of a SOURCE of this project or detectron2 without a config, all weights are written, as by --whole.
A weight that the backbone needs and that SOURCE lacks, or has in another shape, is an error, and
nothing is written, unless --allow names it. The weights of attention, which a ResNet of torchvision
or timm lacks, are listed in the report and are not an error.
"""


def convert_checkpoint_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_convert_checkpoint` takes."""
    parser = IntermixedParser(description=description, epilog=_EPILOG)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a checkpoint of this project, detectron2, torchvision's or timm's ResNet-50, 101 or "
        "152, or the official SAN release: .pth, .pth.tar, .pt, .pkl, .pyth or .safetensors; or "
        "the config of published weights, such as Digits/retinanet_SASA.yaml",
    )
    parser.add_argument("target", metavar="TARGET", help="the .pth or .safetensors file to write")
    parser.add_argument(
        "--config-file", metavar="FILE", help="yaml config of the model that the weights are for"
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="overrides of the config of --config-file"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=WEIGHTS[0],
        help="weights of the last step, raw, or their moving average, ema; raw by default",
    )
    parser.add_argument(
        "--prefix",
        default="",
        help="what the names of the network's weights begin with, where those of other weights do "
        "not, such as model. of Lightning; a prefix that all names have is found without it, and "
        "so are the parts that torch.compile, DDP and FSDP put into names",
    )
    parser.add_argument(
        "--allow",
        metavar="PATTERN",
        action="append",
        default=[],
        help="shell pattern of weights that may be missing, of another shape or left over, as in "
        "'res5.*'; may be given more than once",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="write all weights under their own names without the state of training, as to publish "
        "a detector",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
    return parser


def run_convert_checkpoint(args: argparse.Namespace) -> None:
    """Convert as a command line of :func:`convert_checkpoint_parser` says.

    Raises:
        UsageError, CheckpointError: in one sentence; the target is whole or not there.
    """
    log_to(None)
    names = ("weights", "prefix", "allow", "whole", "overwrite")
    options = {name: getattr(args, name) for name in names}
    try:
        if args.opts and not args.config_file:
            raise UsageError(
                "KEY VALUE pairs change the config of --config-file, and none is given."
            )
        if args.whole and (args.config_file or args.allow):
            raise UsageError("--whole takes no --config-file and no --allow.")
        model = build_target(args.config_file, args.opts) if args.config_file else None
        report = convert_checkpoint(args.source, args.target, model, **options)
    except TransferError as error:
        print(error.report)
        raise
    print(report)
