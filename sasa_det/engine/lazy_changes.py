"""What may change in a LazyConfig whose run is resumed."""

import logging
from fnmatch import fnmatchcase

from .config_changes import _Change, _changes, _comparable, _may_change
from .errors import UsageError
from .lazy_config import KEYS, LazySettings

__all__ = ["check_changes", "log_changes"]

logger = logging.getLogger(__name__)

_YAML_KEYS = {name: key for key, name in KEYS.items()}
# Whether a key may change that yaml configs do not have. The first pattern that fits it decides; a
# key that none fits may.
_LAZY_KEYS_MAY_CHANGE = {
    # How the same model is run and tested.
    "model.*.backend": True,
    "model.*test_*": True,
    "model.max_detections_per_image": True,
    "model.vis_period": True,
    "model.*": False,
    # How the optimizer groups the parameters, by which it finds their state in a checkpoint.
    "optimizer._target_": False,
    "optimizer.params.*": False,
    "optimizer.weight_decay": False,
    # The order of the data.
    "dataloader.train.dataset.*": False,
    "dataloader.train.aspect_ratio_grouping": False,
}


def check_changes(cfg: LazySettings) -> None:
    """Refuse a config that the checkpoints in its output folder do not fit.

    Args:
        cfg: the config of a run that is resumed, before the config.yaml that the run left in its
            output folder is written over.

    Raises:
        UsageError: in one sentence that names all keys with their old and new values.
    """
    refused = [change for change in _lazy_changes(cfg) if not _lazy_key_may_change(change)]
    if refused:
        listed = ", ".join(f"{key} (from {old!r} to {new!r})" for key, old, new in refused)
        raise UsageError(
            f"the run in train.output_dir {cfg.OUTPUT_DIR} cannot be resumed with a change of "
            f"{listed}; give the old values, or name another train.output_dir."
        )


def log_changes(cfg: LazySettings) -> None:
    """Log how the config of a resumed run differs from the one in its output folder."""
    for key, old, new in _lazy_changes(cfg):
        logger.info("Changed since the run was started last: %s, from %r to %r.", key, old, new)


def _lazy_changes(cfg: LazySettings) -> list[_Change]:
    """List all changes, of which those in upper case are what a LazyConfig does not have."""
    changes = [c for c in _changes(cfg) if not c.key[0].isupper() and c.key != "train.output_dir"]
    return [c for c in changes if _in_yaml(c, c.old) != _in_yaml(c, c.new)]


def _in_yaml(change: _Change, value):
    return _comparable(_YAML_KEYS.get(change.key, change.key), value)


def _lazy_key_may_change(change: _Change) -> bool:
    patterns = _LAZY_KEYS_MAY_CHANGE.items()
    fitting = (may for pattern, may in patterns if fnmatchcase(change.key, pattern))
    yaml_key = _YAML_KEYS.get(change.key, change.key)
    return _may_change(change._replace(key=yaml_key)) and next(fitting, True)
