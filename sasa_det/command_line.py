"""What commands have in common; it needs neither detectron2 nor a model."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sasa_det_cli import restart_in_utf8

from .errors import USAGE_ERRORS, StopTraining, UsageError, print_error
from .utils.cores import available_cores
from .utils.files import holds_anything


def run_command(main: Callable[[], int | None]) -> int:
    """Run the main function of a command in UTF-8 and print usage errors without a traceback.

    In a locale that is not UTF-8 the command starts again, see
    :func:`sasa_det_cli.restart_in_utf8`. Characters that the terminal does not have are
    printed as escapes.

    Args:
        main: reads the command line and returns the exit status; None is 0.

    Returns:
        int: the exit status: the one that ``main`` returns, 2 after a usage error, which is printed
        as one sentence, 130 after Ctrl-C, or the status of the signal that stopped a training.
    """
    restart_in_utf8()  # a program that did not begin in sasa_det_cli
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main() or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except StopTraining as stop:
        print(f"The command ends: {stop}.", file=sys.stderr)
        return stop.status
    except USAGE_ERRORS as error:
        return print_error(error)


class IntermixedParser(argparse.ArgumentParser):
    """Takes flags among the other arguments as well, wherever a user puts them."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        return self.parse_intermixed_args(args, namespace)


def positive_int(text: str) -> int:
    """Read an argument that must be an integer of at least 1; a type for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Read an argument that must be a number from 0 to 1; a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def share_below_1(text: str) -> float:
    """Read an argument that must be a number from 0 to 1, and not 1; a type for argparse."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"must be below 1, got {text!r}")
    return value


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config of a trained model, and its overrides, to the arguments of a command."""
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="config of the model, if the checkpoint carries none; a LazyConfig is executed",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="overrides of the config"
    )


def add_study_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add where many trainings write, and how many run at a time, to the arguments of a tool."""
    parser.add_argument("--output", default=output, help="folder of the runs; what is there stays")
    parser.add_argument(
        "--jobs", type=positive_int, default=available_cores(), help="trainings at the same time"
    )


def refuse_existing(folder: Path, hint: str = "") -> None:
    """Refuse a folder for output that exists already, unless it is empty.

    Args:
        folder: where a command is about to write.
        hint: ends the message, after what can be done.

    Raises:
        UsageError: naming the folder.
    """
    if holds_anything(folder):
        raise UsageError(f"output {folder} exists already; name another one{hint}.")
