"""The published weights, by the names of their configs.

An entry is the place of a checkpoint and its SHA-256, which is checked whenever the weights are
read. A place is an ``https://`` address, or a path in the folder of this file for weights that are
part of the package; setup.py packages those in weights/.
"""

from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent


class Weights(NamedTuple):
    """Published weights.

    Attributes:
        place: ``https://`` address, or path relative to the folder of this file.
        sha256: of the file, in 64 hexadecimal digits.
    """

    place: str
    sha256: str

    @property
    def address(self) -> str:
        """What ``MODEL.WEIGHTS`` takes: address or path, and ``#sha256=`` with the digest."""
        place = self.place if self.place.startswith("https://") else _FOLDER / self.place
        return f"{place}#sha256={self.sha256}"


# By the name of the config without its suffix: a yaml config and its LazyConfig are one model.
# There are none yet.
CHECKPOINTS: dict[str, Weights] = {}
