"""Where weights come from: this computer, or a server that is not trusted."""

import logging
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

from detectron2.utils.file_io import PathManager

from ..errors import CheckpointError
from .integrity import sha256

logger = logging.getLogger(__name__)

# Where a run gets the name of its weights from.
WEIGHTS_KEYS = "(MODEL.WEIGHTS, or train.init_checkpoint in a LazyConfig)"

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"


class Source(NamedTuple):
    """A file of weights, and whether its names are matched with the model's by their ends."""

    path: Path
    matching_heuristics: bool = False


def locate(weights: str | os.PathLike) -> Source:
    """Find the file that a name of weights stands for, and download it if it is remote.

    What was downloaded before is kept in detectron2's cache, and downloaded anew if its digest is
    another one.

    Args:
        weights: a path, an ``https://`` address, ``detectron2://`` and a path in detectron2's
            model zoo, or the name of a config whose weights :mod:`sasa_det.model_zoo` has.
            ``?matching_heuristics=True`` may follow, as in detectron2, and
            ``#sha256=`` with the 64 hexadecimal digits of the file's SHA-256, without which
            nothing remote is accepted.

    Returns:
        Source: the file, whose digest is the given one if there is one.

    Raises:
        CheckpointError: if the name is none of these, the digest differs, or a download fails.
        UsageError: if the model zoo has no weights of a config.
    """
    weights = os.fspath(weights)
    if os.path.exists(weights):  # whatever characters its name has
        return Source(Path(weights))
    from ..model_zoo.published import find_weights  # which builds models, and they load weights

    weights = os.fspath(find_weights(weights))
    try:
        parts = urlsplit(weights)
    except ValueError as error:
        raise CheckpointError(f"weights {weights} are not a path or address ({error}).") from error
    if not re.fullmatch("(matching_heuristics=(True|False))?", parts.query):
        raise CheckpointError(
            f"weights {weights}: only matching_heuristics=True may follow the question mark."
        )
    if not re.fullmatch("(sha256=[0-9a-fA-F]{64})?", parts.fragment):
        raise CheckpointError(
            f"weights {weights}: only sha256= and 64 hexadecimal digits may follow the #."
        )
    address = parts._replace(query="", fragment="").geturl()
    expected = parts.fragment.removeprefix("sha256=").lower()
    if parts.scheme not in ("", "https", "detectron2"):
        raise CheckpointError(
            f"weights {weights}: must be a path or begin with https:// or detectron2://."
        )
    if parts.scheme and not expected:
        raise CheckpointError(
            f"weights {weights} are remote: give the SHA-256 of the file, as in "
            f"{address}#sha256=<64 hexadecimal digits>."
        )
    if parts.scheme == "detectron2":
        address = _DETECTRON2 + address.removeprefix("detectron2://")
    path = _download(address, expected) if parts.scheme else Path(address)
    if expected and not parts.scheme:
        check_sha256(path, expected)
    return Source(path, parts.query.endswith("True"))


def check_sha256(path: Path, expected: str, name: str = "") -> None:
    """Check the SHA-256 of a file, which a message calls by its path or another name.

    Raises:
        CheckpointError: if it differs or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            found = sha256(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    if found != expected:
        raise CheckpointError(
            f"{name or path} has the SHA-256 {found}, not {expected} as the name of the weights "
            f"{WEIGHTS_KEYS} says."
        )


def _download(address: str, expected: str) -> Path:
    try:
        path = Path(PathManager.get_local_path(address))
        try:
            check_sha256(path, expected)
        except CheckpointError as error:
            logger.warning("In the cache, %s It is downloaded again from %s.", error, address)
            # Other processes may be reading the old file, or download a new one as well.
            with TemporaryDirectory(dir=path.parent) as folder:
                options = {"cache_dir": folder, "force": True}
                fresh = Path(PathManager.get_local_path(address, **options))
                check_sha256(fresh, expected, address)
                fresh.replace(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{address} cannot be downloaded ({error}).") from error
    return path
