"""The options of a run, which yaml configs and LazyConfigs have under different keys."""

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.config.instantiate import dump_dataclass
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, first_line
from .defaults import default_config
from .keys import flatten

# The fields in epochs, and those in iterations that they stand in for.
EPOCHS = {
    "max_epochs": "max_iter",
    "warmup_epochs": "warmup_iters",
    "checkpoint_epochs": "checkpoint_period",
    "step_epochs": "steps",
    "eval_epochs": "eval_period",
}

# The keys of the number of classes, by meta-architecture.
_CLASSES = {
    "RetinaNet": ("MODEL.RETINANET.NUM_CLASSES", "model.num_classes"),
    "GeneralizedRCNN": ("MODEL.ROI_HEADS.NUM_CLASSES", "model.roi_heads.num_classes"),
    "Classifier": ("MODEL.CLASSIFIER.NUM_CLASSES", ""),
}

_DEFAULT = object()
_ABSENT = object()

# The sections of LazyConfigs that are calls of the user's own choice, whose arguments they name.
_CALLS = ("lr_multiplier.", "optimizer.")


def _key(yaml_key: str, lazy_key: str = "", absent: Any = _DEFAULT) -> Any:
    """Describe a field by its keys.

    Args:
        yaml_key: in yaml configs.
        lazy_key: in LazyConfigs; "" if their calls say the same.
        absent: the value of a LazyConfig without the key, if it is not the yaml key's default.
    """
    return dataclasses.field(metadata={"yaml": yaml_key, "lazy": lazy_key, "absent": absent})


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a run, as read from a yaml config or from a LazyConfig.

    Attributes:
        config (CfgNode or DictConfig): the config that the options were read from.
        reload (tuple or None): function and arguments with which another process reads the config
            again, instead of unpickling it.
    """

    config: CfgNode | DictConfig

    output_dir: str = _key("OUTPUT_DIR", "train.output_dir")
    seed: int = _key("SEED", "train.seed")
    float32_precision: str = _key("FLOAT32_PRECISION")
    cudnn_benchmark: bool = _key("CUDNN_BENCHMARK", "train.cudnn_benchmark")
    wandb_project: str = _key("WANDB_PROJECT", "train.wandb_project")

    meta_architecture: str = _key("MODEL.META_ARCHITECTURE", "model._target_")
    device: str = _key("MODEL.DEVICE", "train.device")
    weights: str = _key("MODEL.WEIGHTS", "train.init_checkpoint")
    weights_allow: list[str] = _key("MODEL.WEIGHTS_ALLOW", "train.weights_allow")
    ema_decay: float = _key("MODEL.EMA.DECAY", "train.ema.decay")
    bn_decay: float = _key("MODEL.BN_DECAY")
    activation_checkpointing: list[str] = _key(
        "MODEL.ACTIVATION_CHECKPOINTING", "train.activation_checkpointing"
    )
    channels_last: bool = _key("MODEL.CHANNELS_LAST", "train.channels_last")
    compile: bool = _key("MODEL.COMPILE", "train.compile")
    fsdp: bool = _key("MODEL.FSDP", "train.fsdp")
    mask_on: bool = _key("MODEL.MASK_ON", "dataloader.train.mapper.use_instance_mask")
    keypoint_on: bool = _key("MODEL.KEYPOINT_ON")
    num_keypoints: int = _key("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS")

    train: tuple[str, ...] = _key("DATASETS.TRAIN", "dataloader.train.dataset.names")
    train_json: str = _key("DATASETS.TRAIN_JSON", "dataloader.train_json")
    train_images: str = _key("DATASETS.TRAIN_IMAGES", "dataloader.train_images")
    test: tuple[str, ...] = _key("DATASETS.TEST", "dataloader.test.dataset.names")
    test_json: str = _key("DATASETS.TEST_JSON", "dataloader.test_json")
    test_images: str = _key("DATASETS.TEST_IMAGES", "dataloader.test_images")
    load_proposals: bool = _key("MODEL.LOAD_PROPOSALS")
    proposal_files_train: tuple[str, ...] = _key("DATASETS.PROPOSAL_FILES_TRAIN")
    proposal_files_test: tuple[str, ...] = _key("DATASETS.PROPOSAL_FILES_TEST")
    image_folder: str = _key("DATASETS.IMAGE_FOLDER")
    holdout: float = _key("DATASETS.HOLDOUT")
    num_workers: int = _key("DATALOADER.NUM_WORKERS", "dataloader.train.num_workers")
    sampler: str = _key("DATALOADER.SAMPLER_TRAIN", "dataloader.train.sampler")
    repeat_threshold: float = _key(
        "DATALOADER.REPEAT_THRESHOLD", "dataloader.train.repeat_threshold"
    )
    max_unreadable: int = _key("DATALOADER.SKIP_UNREADABLE", "dataloader.train.max_unreadable")
    max_unreadable_fraction: float = _key(
        "DATALOADER.SKIP_UNREADABLE_FRACTION", "dataloader.train.max_unreadable_fraction"
    )
    image_format: str = _key("INPUT.FORMAT", "dataloader.train.mapper.image_format")
    mask_format: str = _key("INPUT.MASK_FORMAT", "dataloader.train.mapper.instance_mask_format")
    max_pixels: int = _key("INPUT.MAX_PIXELS", "dataloader.train.mapper.max_pixels")

    total_batch_size: int = _key("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size")
    accumulation_steps: int = _key("SOLVER.ACCUMULATION_STEPS", "train.accumulation_steps")
    base_lr: float = _key("SOLVER.BASE_LR", "optimizer.lr")
    reference_batch: int = _key("SOLVER.REFERENCE_BATCH", "train.reference_batch")
    max_iter: int = _key("SOLVER.MAX_ITER", "train.max_iter")
    max_epochs: float = _key("SOLVER.MAX_EPOCHS", "train.max_epochs")
    warmup_iters: int = _key("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_iters", absent=0)
    warmup_epochs: float = _key("SOLVER.WARMUP_EPOCHS", "lr_multiplier.warmup_epochs")
    warmup_factor: float = _key("SOLVER.WARMUP_FACTOR", "lr_multiplier.warmup_factor")
    warmup_method: str = _key("SOLVER.WARMUP_METHOD", "lr_multiplier.warmup_method")
    logit_warmup_iters: int = _key(
        "SOLVER.LOGIT_WARMUP_ITERS", "optimizer.params.logit_warmup_iters"
    )
    lr_scheduler_name: str = _key("SOLVER.LR_SCHEDULER_NAME", absent="")
    steps: tuple[int, ...] = _key("SOLVER.STEPS", absent=())
    step_epochs: tuple[float, ...] = _key("SOLVER.STEP_EPOCHS")
    amp_enabled: bool = _key("SOLVER.AMP.ENABLED", "train.amp.enabled")
    amp_dtype: str = _key("SOLVER.AMP.DTYPE", "train.amp.dtype")
    clip_enabled: bool = _key("SOLVER.CLIP_GRADIENTS.ENABLED", "train.clip_gradients.enabled")
    clip_type: str = _key("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "train.clip_gradients.clip_type")
    clip_value: float = _key("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "train.clip_gradients.clip_value")
    norm_type: float = _key("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "train.clip_gradients.norm_type")
    checkpoint_period: int = _key("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period")
    checkpoint_epochs: float = _key("SOLVER.CHECKPOINT_EPOCHS", "train.checkpoint_epochs")
    max_checkpoints: int = _key("SOLVER.MAX_CHECKPOINTS", "train.checkpointer.max_to_keep")

    log_period: int = _key("LOG_PERIOD", "train.log_period")
    eval_period: int = _key("TEST.EVAL_PERIOD", "train.eval_period")
    eval_epochs: float = _key("TEST.EVAL_EPOCHS", "train.eval_epochs")
    validation_loss: bool = _key("TEST.VALIDATION_LOSS", "train.validation_loss")
    best_metric: str = _key("TEST.BEST_METRIC", "train.best_metric")
    best_mode: str = _key("TEST.BEST_MODE", "train.best_mode")
    early_stopping: int = _key("TEST.EARLY_STOPPING", "train.early_stopping")
    expected_results: list[Any] = _key("TEST.EXPECTED_RESULTS")
    tta_enabled: bool = _key("TEST.AUG.ENABLED")
    precise_bn: bool = _key("TEST.PRECISE_BN.ENABLED", "train.precise_bn.enabled")
    precise_bn_iters: int = _key("TEST.PRECISE_BN.NUM_ITER", "train.precise_bn.num_iter")

    reload: tuple[Callable[..., "RunOptions"], tuple] | None = None

    @classmethod
    def read(cls, config: CfgNode | DictConfig) -> "RunOptions":
        """Read the options of a yaml config with sasa_det's keys, or of a LazyConfig.

        Raises:
            UsageError: naming a key of a LazyConfig that has no value or one of another type.
        """
        is_yaml = isinstance(config, CfgNode)
        values = flatten(config if is_yaml else default_config())
        values.setdefault("FLOAT32_PRECISION", "")  # later detectron2
        options = {name: values[key] for name, key in YAML_KEYS.items()}
        if not is_yaml:
            options = {name: _read_lazy(config, name, value) for name, value in options.items()}
        return cls(config, **options)

    def __reduce_ex__(self, protocol):
        return self.reload or super().__reduce_ex__(protocol)

    @property
    def is_lazy(self) -> bool:
        return not isinstance(self.config, CfgNode)

    @property
    def class_keys(self) -> tuple[str, str]:
        """The keys of the number of classes in yaml and in a LazyConfig; "" if it has none."""
        known = (keys for name, keys in _CLASSES.items() if name in self.meta_architecture)
        return next(known, ("", ""))

    @property
    def class_key(self) -> str:
        """The key of the number of classes in the config; "" if it has none."""
        return self.class_keys[self.is_lazy]

    @property
    def num_classes(self) -> int | None:
        """The value of :attr:`class_key`; None if a LazyConfig does not have the key."""
        value = _get(self.config, self.class_key)
        return None if value is _ABSENT else value

    def key(self, name: str) -> str:
        """Return the key that a field has in the config, or in yaml if a LazyConfig has none."""
        return (LAZY_KEYS.get(name) if self.is_lazy else None) or YAML_KEYS[name]

    def setting(self, key: str, value: Any) -> str:
        """Return how a command line sets a key of the config."""
        if not self.is_lazy:
            return f"{key} {value}"
        return f"{'+' if _get(self.config, key) is _ABSENT else ''}{key}={value}"

    def image_options(self) -> dict[str, int | str]:
        """Return the keyword arguments of the checks of COCO-format data."""
        return {
            "max_pixels": self.max_pixels,
            "mask_format": self.mask_format if self.mask_on else "",
            "num_keypoints": self.num_keypoints if self.keypoint_on else 0,
        }

    def replace(self, **values: Any) -> "RunOptions":
        """Return options with other values, in a copy of the config as well.

        Args:
            values: by field, or as ``num_classes``. The calls of the optimizer and the schedule of
                a LazyConfig are not given arguments that they do not have.
        """
        config = self.config.clone() if not self.is_lazy else copy.deepcopy(self.config)
        for name, value in values.items():
            key = self.class_key if name == "num_classes" else self.key(name)
            _set(config, key, value)
        values.pop("num_classes", None)
        return dataclasses.replace(self, config=config, **values)

    def dump(self) -> str:
        """Return the config as yaml, which detectron2 reads."""
        if not self.is_lazy:
            return self.config.dump()
        values = plain(self.config)
        return yaml.safe_dump(
            values, allow_unicode=True, sort_keys=False, default_flow_style=None, width=9999
        )


_FIELDS = {f.name: f.metadata for f in dataclasses.fields(RunOptions) if f.metadata}

YAML_KEYS = {name: keys["yaml"] for name, keys in _FIELDS.items()}

LAZY_KEYS = {name: keys["lazy"] for name, keys in _FIELDS.items() if keys["lazy"]}


def _read_lazy(config: DictConfig, name: str, default: Any) -> Any:
    """Read a field of a LazyConfig, of the type that it has in a yaml config if nothing is lost."""
    keys = _FIELDS[name]
    value = _get(config, keys["lazy"]) if keys["lazy"] else _ABSENT
    if name == "meta_architecture":
        return getattr(value, "__name__", str(value).rpartition(".")[2])
    if value is _ABSENT:
        return default if keys["absent"] is _DEFAULT else keys["absent"]
    if isinstance(default, (list, tuple)):
        value = [value] if isinstance(value, str) else plain(value)
        return type(default)(value) if isinstance(value, list) else value
    return float(value) if isinstance(default, float) and type(value) is int else value


def _get(config: CfgNode | DictConfig, key: str) -> Any:
    if isinstance(config, CfgNode):
        return flatten(config)[key]
    try:
        return OmegaConf.select(config, key, default=_ABSENT)
    except OmegaConfBaseException as error:
        raise UsageError(f"{key}: {first_line(error)}") from error


def _set(config: CfgNode | DictConfig, key: str, value: Any) -> None:
    if isinstance(config, CfgNode):
        config.defrost()
        section, _, name = f".{key}".rpartition(".")
        node = config
        for part in section.split(".")[1:]:
            node = node[part]
        node[name] = value
        config.freeze()
    elif _get(config, key) is not _ABSENT or not key.startswith(_CALLS):
        value = list(value) if isinstance(value, tuple) else value
        OmegaConf.update(config, key, value, force_add=True)


def plain(value: Any) -> Any:
    """Return a LazyConfig as values that yaml can store: names for classes and functions."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, structured_config_mode=SCMode.INSTANTIATE)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dump_dataclass(value))
    if callable(value):
        try:
            return _convert_target_to_string(value)
        except AttributeError:
            pass
    # An object cannot be read back: this is for the reader of the file.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
