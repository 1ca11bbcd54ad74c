"""The configs of this project by name, and the models that were trained with them."""

from .model_zoo import get, get_checkpoint_url, get_config, get_config_file, get_sample_images

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "get_sample_images"]
