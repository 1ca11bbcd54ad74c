"""The errors that commands report in one sentence, without a traceback."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

from .utils.text import printable


class CheckpointError(Exception):
    """A checkpoint cannot be read, written or used."""


class TransferError(CheckpointError):
    """A checkpoint lacks weights that a backbone needs.

    Attributes:
        report (Report): what became of every weight.
    """

    def __init__(self, message: str, report: object):
        super().__init__(message)
        self.report = report


class DatasetError(ValueError):
    """A data set cannot be used as it is."""


class ImageError(DatasetError):
    """An image cannot be used.

    Attributes:
        path (str or None): the image's file.
    """

    def __init__(self, message, path=None):
        # One positional argument rebuilds it, as pickle and torch's worker processes do.
        super().__init__(message)
        self.path = path


class UsageError(Exception):
    """A command, a config or an output folder holds a mistake of the user."""


class StopTraining(BaseException):
    """Training stopped before its last iteration, and everything is saved.

    Like KeyboardInterrupt it is not an Exception, so that it is not handled as a failure.

    Attributes:
        status (int): exit status of the process.
    """

    def __init__(self, reason: str, status: int = 0):
        super().__init__(reason)
        self.status = status


# What commands report without a traceback.
USAGE_ERRORS = (UsageError, CheckpointError, DatasetError, FileNotFoundError)


def first_line(error: Exception) -> str:
    """Return the first line of the message of an error, for a sentence about it."""
    return str(error.args[0] if error.args else error).strip().partition("\n")[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name, with a similar known one if there is any.

    Args:
        name: what was given.
        known: what is allowed.

    Returns:
        str: "; did you mean ...?" or a full stop.
    """
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "."


def print_error(error: Exception) -> int:
    """Print an error to stderr, with its traceback if $SASA_DET_TRACEBACK is set.

    Args:
        error: one of :data:`USAGE_ERRORS`.

    Returns:
        int: the exit status of the command, 2.
    """
    if os.environ.get("SASA_DET_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return 2
