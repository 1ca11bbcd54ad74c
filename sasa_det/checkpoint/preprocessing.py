"""How images are prepared for a network, as files of weights tell it."""

from typing import Any

__all__ = ["IMAGENET", "is_preprocessing"]

# How torchvision, timm and SAN's authors prepare them: mean and standard deviation by channel, in
# units of 0 to 255.
IMAGENET = {
    "format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}


def is_preprocessing(value: Any) -> bool:
    """Tell whether a value has the form of :data:`IMAGENET`."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("format"), str)
        and all(_are_numbers(value.get(name)) for name in ("pixel_mean", "pixel_std"))
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
