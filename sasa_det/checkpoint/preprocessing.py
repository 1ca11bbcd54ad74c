"""How images are prepared for a network, as files of weights tell it."""

import math
from typing import Any

__all__ = ["IMAGENET", "is_preprocessing"]

# Channels of an image, by the names that detectron2 and Pillow have for their orders.
_CHANNELS = {"L": 1, **dict.fromkeys(("BGR", "RGB", "HSV", "LAB", "YCbCr", "YUV-BT.601"), 3)}

# How torchvision, timm and SAN's authors prepare them: mean and standard deviation by channel, in
# units of 0 to 255.
IMAGENET = {
    "format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}


def is_preprocessing(value: Any) -> bool:
    """Tell whether a value has the form of :data:`IMAGENET`."""
    if not isinstance(value, dict) or not isinstance(value.get("format"), str):
        return False
    mean, std = value.get("pixel_mean"), value.get("pixel_std")
    channels = _CHANNELS.get(value["format"])
    return _are_numbers(mean, channels) and _are_numbers(std, channels) and min(std) > 0


def _are_numbers(values: Any, count: int | None) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
