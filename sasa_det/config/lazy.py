"""Reading LazyConfigs, whose values the engine finds under the keys of yaml configs."""

import builtins
import copy
import dataclasses
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.config.instantiate import dump_dataclass
from detectron2.utils.registry import _convert_target_to_string
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, nearest, print_error
from .defaults import default_config
from .keys import CONFIG_ERRORS, explain, flatten
from .load import class_keys, complete
from .yaml_file import read_config_file

# The keys that the engine reads of a yaml config, and those of a LazyConfig that say the same. The
# rest of a LazyConfig is calls, which are made.
KEYS = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "WANDB_PROJECT": "train.wandb_project",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.WEIGHTS_ALLOW": "train.weights_allow",
    "MODEL.EMA.DECAY": "train.ema.decay",
    "MODEL.ACTIVATION_CHECKPOINTING": "train.activation_checkpointing",
    "MODEL.CHANNELS_LAST": "train.channels_last",
    "MODEL.COMPILE": "train.compile",
    "MODEL.FSDP": "train.fsdp",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "MODEL.RESNETS.NORM": "model.backbone.bottom_up.norm",
    "MODEL.FPN.NORM": "model.backbone.norm",
    "MODEL.RETINANET.NORM": "model.head.norm",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TRAIN_JSON": "dataloader.train_json",
    "DATASETS.TRAIN_IMAGES": "dataloader.train_images",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS.TEST_JSON": "dataloader.test_json",
    "DATASETS.TEST_IMAGES": "dataloader.test_images",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.SAMPLER_TRAIN": "dataloader.train.sampler",
    "DATALOADER.REPEAT_THRESHOLD": "dataloader.train.repeat_threshold",
    "DATALOADER.SKIP_UNREADABLE": "dataloader.train.max_unreadable",
    "DATALOADER.SKIP_UNREADABLE_FRACTION": "dataloader.train.max_unreadable_fraction",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "INPUT.MAX_PIXELS": "dataloader.train.mapper.max_pixels",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.REFERENCE_BATCH": "train.reference_batch",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.MAX_EPOCHS": "train.max_epochs",
    "SOLVER.WARMUP_ITERS": "lr_multiplier.warmup_iters",
    "SOLVER.WARMUP_EPOCHS": "lr_multiplier.warmup_epochs",
    "SOLVER.WARMUP_FACTOR": "lr_multiplier.warmup_factor",
    "SOLVER.WARMUP_METHOD": "lr_multiplier.warmup_method",
    "SOLVER.ACCUMULATION_STEPS": "train.accumulation_steps",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "train.clip_gradients.enabled",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "train.clip_gradients.clip_type",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "train.clip_gradients.clip_value",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "train.clip_gradients.norm_type",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.CHECKPOINT_EPOCHS": "train.checkpointer.epochs",
    "SOLVER.MAX_CHECKPOINTS": "train.checkpointer.max_to_keep",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.EVAL_EPOCHS": "train.eval_epochs",
    "TEST.VALIDATION_LOSS": "train.validation_loss",
    "TEST.BEST_METRIC": "train.best_metric",
    "TEST.BEST_MODE": "train.best_mode",
    "TEST.EARLY_STOPPING": "train.early_stopping",
    "TEST.PRECISE_BN.ENABLED": "train.precise_bn.enabled",
    "TEST.PRECISE_BN.NUM_ITER": "train.precise_bn.num_iter",
}

# One of them in a message, and not in a path.
_YAML_KEY = re.compile(
    rf"(?<![\w./-])({'|'.join(map(re.escape, sorted(KEYS, key=len, reverse=True)))})(?![\w/-]|\.\w)"
)

_ABSENT = object()

_SECTIONS = ("dataloader", "lr_multiplier", "model", "optimizer", "train")


class LazySettings(CfgNode):
    """What the engine reads of a LazyConfig, under the keys of yaml configs.

    Another process that it is sent to executes the config anew, with the data sets that its code
    registers.

    Attributes:
        lazy (DictConfig): the LazyConfig.
        source (tuple): config file, overrides and data sets of the command line.
    """

    lazy: DictConfig
    source: tuple

    def __reduce__(self):
        config_file, overrides, *data = self.source
        # Which only the process that reads the data knows.
        classes = [f"{KEYS[key]}={flatten(self)[key]}" for key in class_keys(self)]
        return _load_unchecked, (config_file, [*overrides, *classes], *data)

    def __deepcopy__(self, memo: dict) -> "LazySettings":
        copied = LazySettings()
        copied.update({key: copy.deepcopy(value, memo) for key, value in self.items()})
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def dump(self, **kwargs: Any) -> str:
        """Return the LazyConfig as yaml, which LazyConfig.load reads."""
        options = {"sort_keys": False, "default_flow_style": None, "width": 9999, **kwargs}
        return yaml.safe_dump(_plain(self.lazy), allow_unicode=True, **options)


def load_lazy_config(
    config_file: str,
    overrides: Sequence[str] = (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    *,
    check: bool = True,
) -> LazySettings:
    """Execute the Python code of a LazyConfig, and override values in it.

    Args:
        config_file: path of a Python file, or of the config.yaml that a run stored.
        overrides: ``key=value`` words as :meth:`LazyConfig.apply_overrides` reads them; a ``+``
            before the key adds one that is not there.
        train, test: (json, image folder) of COCO-format data to use in place of the config's.
        check: False in the processes of a run whose data were checked before they were started.

    Returns:
        LazySettings: frozen, with the number of classes of the named data unless ``overrides``
        sets it.

    Raises:
        UsageError: on a file that cannot be used, an unknown key or a wrong value.
        DatasetError, FileNotFoundError: as :func:`sasa_det.config.load.register_datasets`.
    """
    lazy = _load(config_file)
    overridden = _override(lazy, [word for word in overrides if word != "--"])
    for section in _SECTIONS:
        if not OmegaConf.is_dict(lazy[section]):
            raise UsageError(f"{section} must be a section of keys, got {lazy[section]!r}.")
    for split, source in (("train", train), ("test", test)):
        if source:
            lazy.dataloader[f"{split}_json"], lazy.dataloader[f"{split}_images"] = source
    cfg = _settings(lazy)
    before = flatten(cfg)
    complete(cfg, [key for key, name in KEYS.items() if name in overridden], check=check)
    for key, value in flatten(cfg).items():
        if value != before[key]:
            OmegaConf.update(lazy, KEYS[key], list(value) if isinstance(value, tuple) else value)
    object.__setattr__(cfg, "source", (config_file, list(overrides), train, test))
    cfg.freeze()
    return cfg


def _load_unchecked(*source: Any) -> LazySettings:
    return load_lazy_config(*source, check=False)


def tell_in_lazy_keys(error: Exception) -> int:
    """Print a mistake as :func:`sasa_det.errors.print_error`, in the keys of LazyConfigs."""
    told = UsageError(_YAML_KEY.sub(lambda match: KEYS[match[0]], str(error)))
    told.__cause__ = error
    return print_error(told)


def _load(path: str) -> DictConfig:
    if not os.path.isfile(path):
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"config file {path!r} {kind}; --config-file must name a LazyConfig.")
    if path.endswith((".yaml", ".yml")):
        # As a run stores it. Not LazyConfig.load, by which yaml could execute code as well.
        lazy = OmegaConf.create(read_config_file(path)[-1][1], flags={"allow_objects": True})
    else:
        lazy = _execute(path)
    absent = [name for name in _SECTIONS if not OmegaConf.is_dict(lazy.get(name))]
    if absent:
        raise UsageError(
            f"config file {path} has no {' and no '.join(absent)}: a LazyConfig has "
            f"{', '.join(_SECTIONS)}; a yaml config is for tools/train_net.py."
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
    return f"{place}: {type(error).__name__}: {_first_line(error)}"


def _override(lazy: DictConfig, words: Sequence[str]) -> set[str]:
    """Apply overrides and return their keys."""
    keys = set()
    for word in words:
        key, equals, _ = word.lstrip("+").partition("=")
        if word.startswith("--"):
            raise UsageError(f"flags come before the key=value pairs, got {key} among these.")
        if not equals or word.startswith("~"):
            raise UsageError(f"config overrides must be key=value, got {word!r}.")
        known = list(_keys(_plain(lazy)))
        if key not in known and not word.startswith("+"):
            raise UsageError(f"config key {key} does not exist{nearest(key, known)}")
        try:
            LazyConfig.apply_overrides(lazy, [word.lstrip("+")])
        except (HydraException, OmegaConfBaseException, LookupError, ValueError) as error:
            raise UsageError(f"{word!r} is no override: {_first_line(error)}") from error
        keys.add(key)
    return keys


def _settings(lazy: DictConfig) -> LazySettings:
    """Collect what the engine reads of a LazyConfig; the rest has detectron2's defaults."""
    train_keys = [name for name in KEYS.values() if name.startswith("train.")]
    for key in flatten(_plain(lazy.train), "train."):
        if key not in train_keys:
            raise UsageError(f"config key {key} does not exist{nearest(key, train_keys)}")
    cfg = LazySettings()
    cfg.update(default_config())
    object.__setattr__(cfg, "lazy", lazy)  # a CfgNode's own would take it for a key
    # The learning rate follows lr_multiplier, which need not have a warmup in iterations.
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0, ()
    target = lazy.model.get("_target_", "")
    cfg.MODEL.META_ARCHITECTURE = getattr(target, "__name__", str(target).rpartition(".")[2])
    known = flatten(cfg)
    for key, name in KEYS.items():
        try:
            value = OmegaConf.select(lazy, name, default=_ABSENT)
        except OmegaConfBaseException as error:
            raise UsageError(f"{name}: {_first_line(error)}") from error
        if value is _ABSENT or callable(value):  # as a norm may be
            continue
        value = _as_in_yaml(value, known[key])
        try:
            cfg.merge_from_list([key, value])
        except CONFIG_ERRORS as error:
            raise UsageError(explain(error, cfg, {key: value})) from error
    return cfg


def _as_in_yaml(value: Any, default: Any) -> Any:
    """Make a value of the type that its key has in a yaml config, if that loses nothing."""
    if OmegaConf.is_config(value):
        value = _plain(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, str):
        return [value]
    return value


def _plain(value: Any) -> Any:
    """Return what yaml can hold of a config: names for classes and functions."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, structured_config_mode=SCMode.INSTANTIATE)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dump_dataclass(value))
    if callable(value):
        try:
            return _convert_target_to_string(value)
        except AttributeError:
            pass
    # Of an object, for the reader's eye.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """List all keys of nested dicts and lists."""
    parts = enumerate(values) if isinstance(values, list) else values.items()
    for key, value in parts:
        yield f"{prefix}{key}"
        if isinstance(value, (dict, list)):
            yield from _keys(value, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error.args[0] if error.args else error).strip().partition("\n")[0]
