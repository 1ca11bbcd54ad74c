"""Counting the model of a config, whose mistakes are told in one sentence."""

from detectron2.config import CfgNode

from ..modeling.complexity import Part, count_config
from .errors import UsageError
from .model_check import BUILD_ERRORS, explain_build_error

__all__ = ["count_model", "usual_size"]

# The side of the images that the paper counts detectors on.
_DETECTOR_SIZE = 640


def count_model(cfg: CfgNode, height: int, width: int) -> list[Part]:
    """Count the model that a config builds, as :func:`count_config` does.

    Args:
        cfg: a config of a model with a backbone.
        height, width: size of the image in pixels.

    Returns:
        list[Part]: the parts of the model.

    Raises:
        UsageError: from the error that building or running the model raised.
    """
    try:
        return count_config(cfg, height, width)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error


def usual_size(cfg: CfgNode) -> tuple[int, int]:
    """Return height and width of the images that a config's model is counted on by default."""
    is_classifier = cfg.MODEL.META_ARCHITECTURE == "Classifier"
    side = cfg.INPUT.CLASSIFICATION.CROP_SIZE if is_classifier else _DETECTOR_SIZE
    return side, side
