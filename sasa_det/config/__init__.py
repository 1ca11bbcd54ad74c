"""The keys that sasa_det adds to detectron2's config."""

from .defaults import MAX_PIXELS, add_sasa_config

__all__ = ["MAX_PIXELS", "add_sasa_config"]
