"""Keys of this project's recipes, and whether what trains a model reads them.

detectron2's own trainers build a mapper, an optimizer and a schedule that do not know these keys:
a recipe would be lost without a word.
"""

import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from detectron2.config import CfgNode, get_cfg

from .defaults import default_config
from .keys import flatten
from .read_keys import is_read

logger = logging.getLogger(__name__)

# What the model itself is built from, and limits, whose absence changes no result.
_OF_THE_MODEL = ("MODEL.SASA.*", "MODEL.SAN.*", "MODEL.CLASSIFIER.*", "INPUT.MAX_PIXELS")


def recipe_keys(cfg: CfgNode) -> list[str]:
    """Return the keys that a config sets and that nothing in detectron2 reads.

    Args:
        cfg: a config; one without sasa_det's keys has none.
    """
    values = flatten(cfg)
    keys = [key for key, default in _defaults().items() if values.get(key, default) != default]
    if not values.get("INPUT.JITTER.ENABLED"):
        keys = [key for key in keys if not key.startswith("INPUT.JITTER.")]
    return keys


@cache  # it is asked for whenever a model is built
def _defaults() -> dict[str, Any]:
    """Return the defaults of this project's keys that the model is not built from."""
    theirs = flatten(get_cfg())
    return {
        key: default
        for key, default in flatten(default_config()).items()
        if key not in theirs and not any(fnmatchcase(key, each) for each in _OF_THE_MODEL)
    }


def warn_of_unread(keys: Iterable[str]) -> None:
    """Log which of some keys nothing has read; to be called when a training begins.

    Args:
        keys: :func:`recipe_keys` of the config that the model was built from.
    """
    unread = [key for key in keys if not is_read(key)]
    if unread:
        logger.warning(
            "The config sets %s, which this training does not read, as detectron2's trainers do "
            "not: `sasa-det train` does, and sasa_det.engine.recipe has what a Trainer of "
            "detectron2 needs to read most of them.",
            ", ".join(unread),
        )
