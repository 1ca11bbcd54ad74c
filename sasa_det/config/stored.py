"""The config that a checkpoint holds, which is read without its data and without executing code."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import locate
from omegaconf import OmegaConf

from ..config_files import find_config
from ..errors import UsageError
from ..utils.text import abbreviated_list
from .defaults import default_config
from .keys import CONFIG_ERRORS, explain, flatten, with_floats
from .lazy import load_lazy_config, override
from .load import WITHOUT_DATA, check_pairs, load_config, merge_overrides
from .options import RunOptions
from .values import check_values
from .yaml_file import parse_config, read_config_file

logger = logging.getLogger(__name__)

_LAZY_WITHOUT_DATA = tuple(
    f"+dataloader.{split}_{part}=''" for split in ("train", "test") for part in ("json", "images")
)

# The parts of a LazyConfig that prediction builds.
_BUILT = ("model", "dataloader.test.mapper")

# The packages that it may be imported from, and where its classes may be defined.
_PACKAGES = ("sasa_det.", "detectron2.", "torch.nn.")

_CLASSES_FROM = (
    "sasa_det.modeling.",
    "sasa_det.layers.",
    "sasa_det.data.mapper.",
    "detectron2.modeling.",
    "detectron2.layers.",
    "detectron2.data.transforms.",
    "detectron2.data.dataset_mapper.",
    "torch.nn.modules.",
)


def options_without_data(config_file: str, opts: Sequence[str] = ()) -> RunOptions:
    """Read a config file for a model alone; the data that it names need not be there.

    Args:
        config_file: a yaml config, a LazyConfig in Python, which is executed, or a stored
            config.yaml of either kind; or name of one of the project's configs.
        opts: KEY VALUE pairs, or key=value for a LazyConfig.

    Raises:
        UsageError: on a file that cannot be used, an unknown key or a wrong value.
    """
    config_file = find_config(config_file)
    if is_lazy_config(config_file):
        return load_lazy_config(config_file, [*opts, *_LAZY_WITHOUT_DATA])
    opts = [word for word in opts if word != "--"]
    check_pairs(opts)
    return RunOptions.read(load_config(config_file, [*opts, *WITHOUT_DATA]))


def stored_options(text: str, owner: str, opts: Sequence[str] = ()) -> RunOptions:
    """Read the config that a checkpoint holds.

    Keys that this version of detectron2 and of this project do not have are left out, which is
    logged. A LazyConfig may name the classes of models and augmentations of this project, of
    detectron2 and of torch alone, so that no checkpoint can have other code executed.

    Args:
        text: yaml.
        owner: what holds it, for messages.
        opts: KEY VALUE pairs, or key=value for a LazyConfig.

    Raises:
        UsageError: on a config that cannot be used, an unknown key among ``opts`` or a wrong value.
    """
    values = parse_config(owner, text)
    if not _is_lazy(values):
        return _stored_yaml(values, owner, opts)
    config = OmegaConf.create(values, flags={"allow_objects": True})
    override(config, [*opts, *_LAZY_WITHOUT_DATA])
    # Resolved: an interpolation may bring in a call from anywhere in the config.
    for part in _BUILT:
        built = OmegaConf.select(config, part)
        if not OmegaConf.is_dict(built):
            raise UsageError(f"{owner} has no {part}.")
        for target in _targets(OmegaConf.to_container(built, resolve=True)):
            _check_target(target, owner)
    return RunOptions.read(config)


def is_lazy_config(config_file: str) -> bool:
    """Return whether a file is a LazyConfig: Python code, or the yaml that a run stores of it."""
    return config_file.endswith(".py") or _is_lazy(read_config_file(config_file)[-1][1])


def _is_lazy(values: Mapping[str, Any]) -> bool:
    model = values.get("model")
    return isinstance(model, Mapping) and "_target_" in model


def _stored_yaml(values: dict[str, Any], owner: str, opts: Sequence[str]) -> RunOptions:
    cfg = default_config()
    unknown: list[str] = []
    known = _only_known(values, cfg, unknown)
    if unknown:
        logger.warning(
            "%s: keys that do not exist here are left out: %s", owner, abbreviated_list(unknown, 5)
        )
    try:
        cfg.merge_from_other_cfg(CfgNode(with_floats(known, cfg)))
    except CONFIG_ERRORS as error:
        raise UsageError(f"{owner}: {explain(error, cfg, flatten(known))}") from error
    for words in (opts, WITHOUT_DATA):
        merge_overrides(cfg, [word for word in words if word != "--"])
    check_values(flatten(cfg))
    cfg.freeze()
    return RunOptions.read(cfg)


def _only_known(
    values: Mapping[str, Any], cfg: Mapping[str, Any], unknown: list[str], prefix: str = ""
) -> dict[str, Any]:
    """Return nested values without the keys that a config does not have, which are listed."""
    known = {}
    for key, value in values.items():
        if key not in cfg:
            unknown.append(prefix + key)
        elif isinstance(value, Mapping) and isinstance(cfg[key], Mapping):
            known[key] = _only_known(value, cfg[key], unknown, f"{prefix}{key}.")
        else:
            known[key] = value
    return known


def _targets(values: Any) -> Iterator[Any]:
    """List what the calls in nested values call."""
    if isinstance(values, dict):
        if "_target_" in values:
            yield values["_target_"]
        values = values.values()
    elif not isinstance(values, list):
        return
    for value in values:
        yield from _targets(value)


def _check_target(target: Any, owner: str) -> None:
    found = None
    if isinstance(target, str) and target.startswith(_PACKAGES):
        try:
            found = locate(target)
        except Exception as error:  # whatever importing a module may raise
            raise UsageError(f"{owner}: {target} cannot be imported here ({error}).") from error
    # A module has names of other modules as well.
    if not isinstance(found, type) or not f"{found.__module__}.".startswith(_CLASSES_FROM):
        raise UsageError(
            f"{owner} calls {target!r}, which a checkpoint may not: if you trust it, give its "
            "LazyConfig with --config-file."
        )
