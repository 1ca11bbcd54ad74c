"""What may change in the config of a run that is resumed."""

import logging
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode

from ..errors import UsageError
from .defaults import default_config
from .keys import flatten
from .options import RunOptions
from .yaml_file import read_config_file

logger = logging.getLogger(__name__)

# Whether a key may change. The first pattern that fits it decides; one that none fits may.
_MAY_CHANGE = {
    # How the same model is run and tested.
    "MODEL.DEVICE": True,
    "MODEL.WEIGHTS*": True,
    "MODEL.SASA.BACKEND": True,
    "MODEL.ACTIVATION_CHECKPOINTING": True,
    "MODEL.CHANNELS_LAST": True,
    "MODEL.COMPILE": True,
    "MODEL.FSDP": True,
    "MODEL.*_TEST": True,
    "MODEL.PANOPTIC_FPN.COMBINE.*": True,
    # The model, its input and its losses.
    "MODEL.*": False,
    "INPUT.FORMAT": False,
    # How the optimizer groups the parameters, by which it finds their state in a checkpoint.
    "SOLVER.OPTIMIZER": False,
    "SOLVER.WEIGHT_DECAY*": False,
    "SOLVER.*_LR_FACTOR": False,
    # The order of the data. Where files are may change: the checkpoint has a digest of the records.
    "SEED": False,
    "DATASETS.TRAIN_IMAGES": True,
    "DATASETS.TRAIN_JSON": True,
    "DATASETS.*TRAIN*": False,
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "DATALOADER.REPEAT_*": False,
    "DATALOADER.SAMPLER_TRAIN": False,
    "INPUT.JITTER.ENABLED": False,
    # The same in LazyConfigs.
    "model.*.backend": True,
    "model.*test_*": True,
    "model.max_detections_per_image": True,
    "model.*": False,
    "optimizer._target_": False,
    "optimizer.params.*": False,
    "optimizer.weight_decay": False,
    "train.seed": False,
    "dataloader.train.dataset.*": False,
    "dataloader.train.sampler": False,
    "dataloader.train.repeat_threshold": False,
    "dataloader.train.aspect_ratio_grouping": False,
    "dataloader.train.mapper.image_format": False,
}

_DATASETS = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "dataloader.train.dataset.names",
    "dataloader.test.dataset.names",
)

# The value of a key where only another version of detectron2 or of this project has it.
_NO_KEY = "(no such key)"


class _Change(NamedTuple):
    key: str
    old: Any
    new: Any


def check_changes(options: RunOptions) -> None:
    """Refuse a config that the checkpoints in its output folder do not fit.

    Args:
        options: of a run that is resumed in its output folder, before the config.yaml that the run
            left there is written over.

    Raises:
        UsageError: in one sentence that names all keys with their old and new values, or says why
            the stored config cannot be read.
    """
    changes = _changes(options)
    # Without a SAN, nothing of the model depends on its section.
    if "_san_" not in str(_as_stored(options).get("MODEL.BACKBONE.NAME")):
        changes = [change for change in changes if not change.key.startswith("MODEL.SAN.")]
    refused = [change for change in changes if not _may_change(change)]
    if refused:
        folder = options.key("output_dir")
        listed = ", ".join(f"{key} (from {old!r} to {new!r})" for key, old, new in refused)
        raise UsageError(
            f"the run in {folder} {options.output_dir} cannot be resumed with a change of "
            f"{listed}; give the old values, or name another {folder}."
        )


def log_changes(options: RunOptions) -> None:
    """Log how the config of a resumed run differs from the one in its output folder.

    Args:
        options: as for :func:`check_changes`.
    """
    path = _stored(options)
    if not path.is_file():
        logger.warning("There is no %s to compare the config with.", path)
        return
    for key, old, new in _changes(options):
        logger.info("Changed since the run was started last: %s, from %r to %r.", key, old, new)


def _stored(options: RunOptions) -> Path:
    return Path(options.output_dir, "config.yaml")


def _changes(options: RunOptions) -> list[_Change]:
    """List all changes by key; a key that the stored config lacks had its default."""
    path = _stored(options)
    if not path.exists():
        return []
    new = _as_stored(options)
    # The keys of a stored LazyConfig are not among the defaults.
    defaults = _as_stored(default_config())
    old = {key: value for key, value in defaults.items() if key in new}
    for _, values in read_config_file(str(path)):
        old |= flatten(values)
    # Where a run is stored is where it is resumed, in whatever way that is written.
    keys = sorted((old.keys() | new.keys()) - {"OUTPUT_DIR", "train.output_dir"})
    changes = [_Change(key, old.get(key, _NO_KEY), new.get(key, _NO_KEY)) for key in keys]
    return [c for c in changes if _comparable(c.key, c.old) != _comparable(c.key, c.new)]


def _as_stored(config: CfgNode | RunOptions) -> dict[str, Any]:
    """Return values by key as yaml gives them back, with lists for tuples."""
    return flatten(yaml.safe_load(config.dump()))


def _comparable(key: str, value: Any) -> Any:
    """Make paths of one file equal."""
    if key in _DATASETS and isinstance(value, list):
        return [os.path.realpath(name) for name in value]
    is_path = key.startswith(("DATASETS.", "dataloader.")) and isinstance(value, str) and value
    return os.path.realpath(value) if is_path else value


def _may_change(change: _Change) -> bool:
    if change.new is _NO_KEY:
        return True
    if change.key in _DATASETS and _are_paths(change.old) and _are_paths(change.new):
        return True
    fitting = (may for pattern, may in _MAY_CHANGE.items() if fnmatchcase(change.key, pattern))
    return next(fitting, True)


def _are_paths(names: Any) -> bool:
    """Tell whether data sets are named by where their files are, which may have moved."""
    return bool(names) and all(os.sep in name or name.endswith(".json") for name in names)
