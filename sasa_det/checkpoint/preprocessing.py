"""How images are prepared for a network, as files of weights and configs tell it."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from ..config.keys import flatten

logger = logging.getLogger(__name__)

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


# The keys of yaml configs and of LazyConfigs that say how images are prepared.
_YAML = {
    "format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
}

_LAZY = {
    "format": "dataloader.train.mapper.image_format",
    "pixel_mean": "model.pixel_mean",
    "pixel_std": "model.pixel_std",
}

# Relative difference of means and deviations that makes none to a network: digits that were
# rounded off.
_TOLERANCE = 1e-3


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how a config prepares images.

    Args:
        config: nested values of a yaml config or of a LazyConfig, as a run stores them.

    Returns:
        dict: ``"format"``, the order of channels, and ``"pixel_mean"`` and ``"pixel_std"`` by
        channel, in units of 0 to 255; None if the config does not say all of it.
    """
    values = flatten(config)
    for keys in (_YAML, _LAZY):
        found = {name: values.get(key) for name, key in keys.items()}
        if is_preprocessing(found):
            return {name: v if name == "format" else [*map(float, v)] for name, v in found.items()}
    return None


def warn_of_preprocessing(config: CfgNode | DictConfig, loaded: Mapping[str, Any]) -> None:
    """Log one warning if weights expect images that are prepared in another way than a config's.

    Args:
        config: of a run. Of a LazyConfig, what its model and mapper do not say is not
            compared.
        loaded: what :meth:`sasa_det.checkpoint.Checkpointer.load` returned.
    """
    expected = loaded.get("preprocessing")
    if expected is None:
        return
    if not is_preprocessing(expected):
        logger.warning("The preprocessing of the weights is not understood: %.100r", expected)
        return
    if isinstance(config, CfgNode):
        keys, values, form = _YAML, flatten(config), '{} "{}"'
    else:
        values = {key: OmegaConf.select(config, key) for key in _LAZY.values()}
        keys, form = _LAZY, '"{}={}"'
    changes = [
        form.format(key, expected[name])
        for name, key in keys.items()
        if values[key] is not None and not _same(values[key], expected[name])
    ]
    if changes:
        logger.warning(
            "The weights were trained on images that were prepared in another way: set %s.",
            " ".join(changes),
        )


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return given == expected
    return len(given) == len(expected) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(given, expected, strict=True)
    )
