"""The published weights, by the names of their configs.

An entry is the place of a checkpoint and its SHA-256, which is checked whenever the weights are
read. A place is an ``https://`` address, or a path in the folder of this file for weights that are
part of the package; setup.py packages those in weights/, with the config and the log of the
training beside them.
"""

from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent


class Weights(NamedTuple):
    """Published weights.

    Attributes:
        place: ``https://`` address, or path relative to the folder of this file.
        sha256: of the file, in 64 hexadecimal digits.
        samples: folder of images to try the weights on, relative to the folder of this file; ""
            if there are none.
    """

    place: str
    sha256: str
    samples: str = ""

    @property
    def address(self) -> str:
        """What ``MODEL.WEIGHTS`` takes: address or path, and ``#sha256=`` with the digest."""
        place = self.place if self.place.startswith("https://") else _FOLDER / self.place
        return f"{place}#sha256={self.sha256}"

    @property
    def sample_images(self) -> list[str]:
        """The paths of the images in ``samples``."""
        return sorted(map(str, (_FOLDER / self.samples).iterdir())) if self.samples else []


# By the name of the config without its suffix: a yaml config and its LazyConfig are one model.
CHECKPOINTS: dict[str, Weights] = {
    "Digits/retinanet_SASA": Weights(
        "weights/Digits/retinanet_SASA/model.safetensors",
        "3668df696629ddc8045149f60bd37b67a76bda4c22947713c63dc423d4a02174",
        "weights/Digits/retinanet_SASA/samples",
    ),
    "Digits/retinanet_SASA_conv_stem": Weights(
        "weights/Digits/retinanet_SASA_conv_stem/model.safetensors",
        "352f33f79a22033cab2e95d036772a9df3f91c3b560c840e6a55e21ca73abe06",
        "weights/Digits/retinanet_SASA/samples",
    ),
    "Digits/retinanet_conv": Weights(
        "weights/Digits/retinanet_conv/model.safetensors",
        "61f10cd8acf249e1791151a057752412a9b7e055f0f7ed40ff85ff9af370b065",
        "weights/Digits/retinanet_SASA/samples",
    ),
}
