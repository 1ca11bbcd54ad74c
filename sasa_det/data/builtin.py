"""Where the data sets are that are registered at import."""

import os

# Parts of a data set, and the folders that hold them.
SPLITS = ("train", "val")


def builtin_path(*parts: str) -> str:
    """Return a path under ``$DETECTRON2_DATASETS``, which is ``datasets`` unless it is set."""
    return os.path.join(os.path.expanduser(_root()), *parts)


def root_hint() -> str:
    """Say, for a message about a missing file, what the root of these data sets is."""
    return f"$DETECTRON2_DATASETS, now {_root()!r}, sets the root of the builtin datasets"


def _root() -> str:
    return os.getenv("DETECTRON2_DATASETS", "datasets")
