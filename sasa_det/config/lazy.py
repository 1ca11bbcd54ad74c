"""Reading LazyConfigs."""

import builtins
import dataclasses
import os
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import LazyConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config_files import find_config
from ..errors import UsageError, first_line, nearest
from .defaults import default_config
from .keys import flatten
from .load import complete, overruled
from .options import LAZY_KEYS, YAML_KEYS, RunOptions, plain
from .values import check_values
from .yaml_file import read_config_file

# Of train.ddp, as in detectron2.
_DDP = ("broadcast_buffers", "find_unused_parameters", "fp16_compression")
_SECTIONS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


def load_lazy_config(
    config_file: str,
    overrides: Sequence[str] = (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    *,
    check: bool = True,
) -> RunOptions:
    """Execute the Python code of a LazyConfig, and override values in it.

    Args:
        config_file: path of a Python file, or of the config.yaml that a run stored, or name of one
            of the project's configs.
        overrides: ``key=value`` words as :meth:`LazyConfig.apply_overrides` reads them; a ``+``
            before the key adds one that is not there.
        train, test: words that name data to use instead of the config's, as
            :func:`sasa_det.data.sources.open_data` takes them.
        check: False in the processes of a run whose data were checked before they were started.

    Returns:
        RunOptions: with the number of classes of the named data unless ``overrides`` sets it.

    Raises:
        UsageError: on a file that cannot be used, an unknown key or a wrong value.
        DatasetError, FileNotFoundError: as :func:`sasa_det.config.load.register_datasets`.
    """
    config_file = find_config(config_file)
    lazy = _load(config_file)
    overridden = override(lazy, [word for word in overrides if word != "--"])
    for section in _SECTIONS:
        if not OmegaConf.is_dict(lazy[section]):
            raise UsageError(f"{section} must be a section of keys, got {lazy[section]!r}.")
    train_keys = [name for name in LAZY_KEYS.values() if name.startswith("train.")]
    train_keys += [f"train.ddp.{name}" for name in _DDP]
    for key in flatten(plain(lazy.train), "train."):
        if key not in train_keys:
            raise UsageError(f"config key {key} does not exist{nearest(key, train_keys)}")
    names = {YAML_KEYS[field]: key for field, key in LAZY_KEYS.items()}
    for key in overruled([key for key, name in names.items() if name in overridden]):
        if key in names and OmegaConf.select(lazy, names[key]):
            OmegaConf.update(lazy, names[key], 0)
    for split, source in (("train", train), ("test", test)):
        if source:
            words = [*map(str, source), ""]
            lazy.dataloader[f"{split}_json"], lazy.dataloader[f"{split}_images"] = words[:2]
    options = RunOptions.read(lazy)
    given = {YAML_KEYS[field]: getattr(options, field) for field in LAZY_KEYS}
    if options.class_key and OmegaConf.select(lazy, options.class_key, default=0) != 0:
        in_yaml = options.class_keys[0]
        names[in_yaml], given[in_yaml] = options.class_key, options.num_classes
    check_values({**flatten(default_config()), **given}, names)
    options = complete(options, overridden, check=check)
    # Another process executes the config anew, with the data sets that its code registers. Only
    # the process that reads the data knows the classes.
    classes = [f"{key}={options.num_classes}" for key in (options.class_key,) if key]
    source = (config_file, [*overrides, *classes], train, test)
    return dataclasses.replace(options, reload=(_reload, source))


def _reload(*source: Any) -> RunOptions:
    return load_lazy_config(*source, check=False)


def _load(path: str) -> DictConfig:
    if not os.path.isfile(path):
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"config file {path!r} {kind}; --config-file must name a LazyConfig.")
    if path.endswith((".yaml", ".yml")):
        # As a run stores it. Not LazyConfig.load, by which yaml could execute code as well.
        lazy = OmegaConf.create(read_config_file(path)[-1][1], flags={"allow_objects": True})
    else:
        lazy = _execute(path)
    checkpointer = OmegaConf.select(lazy, "train.checkpointer")
    if OmegaConf.is_dict(checkpointer) and "epochs" in checkpointer:
        # The key of earlier versions, which detectron2's checkpointer does not have.
        lazy.train.checkpoint_epochs = checkpointer.pop("epochs")
    absent = [name for name in _SECTIONS if not OmegaConf.is_dict(lazy.get(name))]
    if absent:
        raise UsageError(
            f"config file {path} has no {' and no '.join(absent)}: a LazyConfig has "
            f"{', '.join(_SECTIONS)}; a yaml config is for sasa-det train."
        )
    return lazy


def _execute(path: str) -> DictConfig:
    replaced = builtins.__import__
    try:
        return LazyConfig.load(path)
    except Exception as error:  # whatever the code in it may raise
        raise UsageError(
            f"{_tell_with_line(path, error)} (with SASA_DET_TRACEBACK=1 in the environment, the "
            "traceback is printed)."
        ) from error
    finally:
        # LazyConfig.load leaves its own there after an error.
        builtins.__import__ = replaced


def _tell_with_line(path: str, error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, SyntaxError):
        file = str(error).removeprefix("Config file ").removesuffix(" has syntax error!")
        return f"{file}, line {cause.lineno}: SyntaxError: {cause.msg}"
    # The innermost of the files that are executed.
    files = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
    place = f"{files[-1].filename}, line {files[-1].lineno}" if files else path
    return f"{place}: {type(error).__name__}: {first_line(error)}"


def override(lazy: DictConfig, words: Sequence[str]) -> set[str]:
    """Apply ``key=value`` words and return their keys; a UsageError tells of one that is wrong."""
    keys = set()
    for word in words:
        key, equals, _ = word.lstrip("+").partition("=")
        if word.startswith("--"):
            raise UsageError(f"flags come before the key=value pairs, got {key} among these.")
        if not equals or word.startswith("~"):
            raise UsageError(f"config overrides must be key=value, got {word!r}.")
        known = list(_keys(plain(lazy)))
        if key not in known and not word.startswith("+"):
            raise UsageError(f"config key {key} does not exist{nearest(key, known)}")
        try:
            LazyConfig.apply_overrides(lazy, [word.lstrip("+")])
        except (HydraException, OmegaConfBaseException, LookupError, ValueError) as error:
            raise UsageError(
                f"the override {word!r} cannot be applied: {first_line(error)}"
            ) from error
        keys.add(key)
    return keys


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """List all keys of nested dicts and lists."""
    parts = enumerate(values) if isinstance(values, list) else values.items()
    for key, value in parts:
        yield f"{prefix}{key}"
        if isinstance(value, (dict, list)):
            yield from _keys(value, f"{prefix}{key}.")
