"""Data sets that are made from a seed: written whole or not at all, and only once."""

import json
import logging
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from .errors import DatasetError

__all__ = ["Progress", "check_integers", "write_once"]

logger = logging.getLogger(__name__)


def check_integers(**arguments):
    """Check that arguments are integers and not too small.

    Args:
        **arguments (tuple[int, int]): the value and the least one allowed, by name.

    Returns:
        dict[str, int]: the values.

    Raises:
        ValueError: one is not as it should be; the message names it.
    """
    for name, (value, least) in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return {name: value for name, (value, _) in arguments.items()}


def write_once(root, kind, info_file, parameters, write):
    """Write a data set to a folder, or reuse it where it is there.

    It is written beside `root` and renamed, so that it is there whole or not at all, also when
    several processes write it at the same time.

    Args:
        root (str or path): the folder.
        kind (str): what is written, for messages.
        info_file (str): the json file in it that holds the parameters, under `info` `parameters`.
        parameters (dict): what the set is made from.
        write (callable): fills an empty folder, given its path and the parameters.

    Returns:
        Path: `root`.

    Raises:
        DatasetError: `root` holds something else than this set.
    """
    root = Path(root)
    if _holds_anything(root):
        _check_parameters(root, kind, info_file, parameters)
        return root

    logger.info("Writing the %s to %s: %s", kind, root, parameters)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        # A subfolder, because the temporary folder itself is readable by its owner only.
        staging = Path(folder) / root.name
        staging.mkdir()
        write(staging, parameters)
        try:
            os.rename(staging, root)
        except OSError:
            if not _holds_anything(root):
                raise
            logger.info("Another process has written %s meanwhile: using that", root)
            _check_parameters(root, kind, info_file, parameters)
    return root


def _holds_anything(root):
    # An empty folder may be taken: renaming onto it replaces it.
    if not root.exists():
        return False
    return not root.is_dir() or any(root.iterdir())


def _check_parameters(root, kind, info_file, parameters):
    try:
        found = json.loads((root / info_file).read_text())["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{root} is not a {kind} ({error.__class__.__name__} reading {info_file}): "
            "name a folder that does not exist"
        ) from error
    if found != parameters:
        raise DatasetError(
            f"{root} was written with {found}, not with the requested {parameters}: "
            "name another folder or remove this one"
        )


class Progress:
    """Logs how many images are written, and when it will be done, every few seconds."""

    def __init__(self, name, total, every=5.0):
        self.name = name
        self.total = total
        self.every = every
        self.done = 0
        self.start = self.last = time.monotonic()

    def step(self):
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= self.every:
            self.last = now
            seconds = round((now - self.start) / self.done * (self.total - self.done))
            eta = timedelta(seconds=seconds)
            logger.info("%s: %d of %d images, ETA %s", self.name, self.done, self.total, eta)
