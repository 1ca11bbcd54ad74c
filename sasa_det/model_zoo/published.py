"""Published weights where a command takes weights: they are named by their config."""

import os
from pathlib import Path

from ..errors import UsageError
from .model_zoo import get_checkpoint_url, get_sample_images


def find_weights(weights: str | os.PathLike) -> str | os.PathLike:
    """Return the address of weights that are named by their config, and others as they are.

    Args:
        weights: of a command or a function that takes the weights of a trained model. No checkpoint
            ends in .yaml or .py: such a name is one of :mod:`sasa_det.model_zoo`.

    Raises:
        UsageError: if the model zoo has no weights of this config.
    """
    if not _names_config(weights):
        return weights
    try:
        return get_checkpoint_url(os.fspath(weights))
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def find_sample_images(weights: str | os.PathLike) -> list[str]:
    """Return the images that this package has for published weights; none for other weights.

    Args:
        weights: as for :func:`find_weights`.

    Raises:
        UsageError: as of :func:`find_weights`.
    """
    find_weights(weights)
    return get_sample_images(os.fspath(weights)) if _names_config(weights) else []


def _names_config(weights: str | os.PathLike) -> bool:
    return Path(weights).suffix in (".py", ".yaml")
