"""The config files of this project, which are found from a checkout and from an installed package.

They lie in configs/ at the top of the repository, where users of detectron2 look for them. An
installed package has the same files in model_zoo/configs, where setup.py puts them.
"""

import logging
import os
from pathlib import Path

from .errors import UsageError, nearest

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "model_zoo" / "configs"

CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """List the project's config files by their paths in its folder of configs.

    Returns:
        list[str]: as "COCO-Detection/retinanet_SASA_R_50_full.yaml", sorted.
    """
    files = (file for suffix in ("py", "yaml") for file in CONFIGS.rglob(f"*.{suffix}"))
    return sorted(file.relative_to(CONFIGS).as_posix() for file in files)


def find_config(name: str) -> str:
    """Find the file of a config that a user names.

    Args:
        name: path of a file or, if there is none, name of one of the project's configs.

    Returns:
        str: path of the file; ``name`` itself if neither exists.

    Raises:
        UsageError: if neither exists and one of the project's configs has a similar name.
    """
    if not name or os.path.exists(name):
        return name
    names = config_names()
    if name in names:
        file = CONFIGS / name
        logger.info("There is no file %s in the current folder: the config is %s.", name, file)
        return str(file)
    if (hint := nearest(name, names)) != ".":
        raise UsageError(f"config file {name} does not exist{hint}")
    return name
