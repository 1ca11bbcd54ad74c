"""The keys that sasa_det adds to detectron2's config."""

from .defaults import MAX_PIXELS, add_sasa_config
from .defaults import default_config as get_cfg  # the name of detectron2's

__all__ = ["MAX_PIXELS", "add_sasa_config", "get_cfg"]
