"""The command line of a run, and how a command ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from detectron2.engine import default_argument_parser

from .errors import USAGE_ERRORS, tell
from .signals import StopTraining

__all__ = ["argument_parser", "positive_int", "run_command"]


def run_command(main: Callable[[], int | None]) -> int:
    """Carry out a command of tools/, whatever the locale, and end it without a traceback.

    In a locale that is not UTF-8 the command starts again in Python's UTF-8 mode, for libraries
    open text files in the encoding of the locale. Characters that the terminal does not have are
    printed as escapes.

    Args:
        main: reads the command line and returns the exit status; None is 0.

    Returns:
        int: the exit status: that of ``main``, 2 after a mistake, which is printed in one sentence,
        130 after Ctrl-C, and that of the signal where one stopped a training.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that it starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
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
        return tell(error)


def argument_parser(*, coco: bool = True) -> argparse.ArgumentParser:
    """Return detectron2's argument parser with this project's flags.

    Args:
        coco: whether there are ``--train`` and ``--test``.

    Returns:
        argparse.ArgumentParser: beside detectron2's flags, ``--train`` and ``--test`` name a
        COCO-format json and its image folder, and ``--overwrite`` allows to write over a run.
        ``--resume`` gives "always" and ``--resume auto`` gives "auto"; without it, ``resume`` is
        None.
    """
    base = default_argument_parser()
    parser = _Parser(
        epilog=base.epilog,
        formatter_class=base.formatter_class,
        parents=[base],
        add_help=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--num-gpus",
        type=positive_int,
        default=1,
        help="processes on this machine, each with a GPU of its own unless it runs on the CPU",
    )
    parser.add_argument(
        "--num-machines", type=positive_int, default=1, help="machines that take part"
    )
    parser.add_argument(
        "--resume",
        choices=("always", "auto"),
        metavar="[auto]",
        help="continue the run in the output folder, which must hold a checkpoint; with auto, as "
        "for jobs that are preempted and started again, begin the run if it holds none",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run left in the output folder; without it, that is an error",
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where the processes of several machines meet, as in tcp://host:port; those of one "
        "machine find each other",
    )
    for split in ("train", "test") if coco else ():
        parser.add_argument(
            f"--{split}",
            nargs=2,
            metavar=("JSON", "IMAGES"),
            help=f"COCO-format json and image folder to {split} on, in place of the config's",
        )
    return parser


def positive_int(text: str) -> int:
    """Read an argument that must be an integer of at least 1; a type for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Takes the word after ``--resume`` for its value only if it is ``auto``.

    argparse alone would take the first KEY of the overrides for it.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        # The words are the command's own if none are given, as argparse has it.
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word == "--resume":
                auto = words[i + 1 : i + 2] == ["auto"]
                words[i : i + 1 + auto] = ["--resume=auto" if auto else "--resume=always"]
        parsed, rest = super().parse_known_args(words, namespace)
        if not 0 <= parsed.machine_rank < parsed.num_machines:
            self.error(
                f"argument --machine-rank: must be at least 0 and below --num-machines, which is "
                f"{parsed.num_machines}, got {parsed.machine_rank}"
            )
        return parsed, rest
