"""Where the log goes."""

import io
import logging
import re
import sys
from collections.abc import Callable

from detectron2.utils.logger import setup_logger

from ..wording import printable

__all__ = ["log_to"]

_LOGGERS = ("detectron2", "fvcore", "sasa_det")
# By which detectron2 colours its tables.
_COLOUR = re.compile("\x1b\\[[0-9;]*m")


def log_to(
    folder: str | None, rank: int = 0, shown: Callable[[logging.LogRecord], bool] | None = None
) -> None:
    """Send the log to the terminal and to a folder's log.txt, in place of where it went before.

    Args:
        folder: folder of log.txt; None for the terminal alone.
        rank: rank of the process; the terminal shows rank 0.
        shown: tells which records the terminal shows; all if None.
    """
    setup_logger.cache_clear()
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        # As default_setup calls it, so that its own call adds nothing.
        named = {} if name == "detectron2" else {"name": name}
        for handler in setup_logger(folder, distributed_rank=rank, **named).handlers:
            handler.addFilter(_escape)
            on_terminal = handler.stream is sys.stdout
            if isinstance(handler.stream, io.TextIOWrapper):
                # Names may have characters that the locale lacks.
                encoding = None if on_terminal else "utf-8"
                handler.stream.reconfigure(encoding=encoding, errors="backslashreplace")
            if shown is not None and on_terminal:
                handler.addFilter(shown)


def _escape(record: logging.LogRecord) -> bool:
    """Escape what names from data hold to steer the terminal that shows the log."""
    record.msg, record.args = _escaped(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = _escaped(logging.Formatter().formatException(record.exc_info))
    return True


def _escaped(text: str) -> str:
    return printable(_COLOUR.sub("", text), keep="\n\t")
