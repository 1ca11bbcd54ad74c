"""Mistakes in what a command is given, and how they are told."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterable

from ..checkpoint.errors import CheckpointError
from ..data.errors import DatasetError
from ..wording import printable

__all__ = ["USAGE_ERRORS", "UsageError", "nearest", "tell"]


class UsageError(Exception):
    """A mistake in a command, a config or an output folder, told in one sentence."""


# What commands tell in one sentence, without a traceback.
USAGE_ERRORS = (UsageError, CheckpointError, DatasetError, FileNotFoundError)


def nearest(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown name with the nearest known one, if there is any.

    Args:
        name: what was given.
        known: what is allowed.

    Returns:
        str: "; did you mean ...?" or a full stop.
    """
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "."


def tell(error: Exception) -> int:
    """Print a mistake to stderr, with its traceback if $SASA_DET_TRACEBACK is set.

    Args:
        error: one of :data:`USAGE_ERRORS`.

    Returns:
        int: the exit status of the command, 2.
    """
    if os.environ.get("SASA_DET_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return 2
