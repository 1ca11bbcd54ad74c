"""Reading the config of a run, and registering the data sets that it names."""

import re
from collections.abc import Collection, Sequence

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from fvcore.common.registry import Registry

from ..data.catalog import num_classes_of
from ..data.coco import register_coco
from ..data.image_folder import check_image_folders, hold_out, register_image_folder
from ..errors import UsageError, nearest
from .defaults import default_config
from .keys import CONFIG_ERRORS, EPOCH_KEYS, all_keys, explain, flatten, unknown_key, with_floats
from .values import check_values
from .yaml_file import read_config_file

_REGISTRIES = {
    registry._name: registry
    for registry in (*vars(modeling).values(), RPN_HEAD_REGISTRY)
    if isinstance(registry, Registry)
}

# The keys whose names detectron2 looks up in its registries; the others are MODEL.<registry>.NAME.
_REGISTRY_KEYS = {
    "META_ARCH": "MODEL.META_ARCHITECTURE",
    "RPN_HEAD": "MODEL.RPN.HEAD_NAME",
    "SEM_SEG_HEADS": "MODEL.SEM_SEG_HEAD.NAME",
}

# What models, optimizers and mappers raise over a config that they cannot be built from.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def explain_build_error(error: Exception) -> str:
    """Turn one of :data:`BUILD_ERRORS` into one sentence."""
    message = (str(error.args[0]) if error.args else "").strip().partition("\n")[0]
    unregistered = re.fullmatch(r"No object named '(.*)' found in '(.*)' registry!", message)
    if unregistered and unregistered[2] in _REGISTRIES:
        name, registry = unregistered.groups()
        known = [known for known, _ in _REGISTRIES[registry]]
        key = _REGISTRY_KEYS.get(registry, f"MODEL.{registry}.NAME")
        return f"{key} {name} is not registered{nearest(name, known)}"
    if isinstance(error, ValueError) and message:
        return message
    return (
        f"the config does not fit together: {type(error).__name__}: {message} (with "
        "SASA_DET_TRACEBACK=1 in the environment, the traceback is printed)."
    )


def image_options(cfg: CfgNode) -> dict[str, int | str]:
    """Return what checks of COCO-format data must know of the config."""
    mask_format = cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else ""
    num_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
    return {
        "max_pixels": cfg.INPUT.MAX_PIXELS,
        "mask_format": mask_format,
        "num_keypoints": num_keypoints,
    }


def load_config(
    config_file: str = "",
    opts: Sequence[str] = (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
) -> CfgNode:
    """Read a config file and overrides, and name the data sets of the command line in it.

    Args:
        config_file: path of a yaml file; "" for detectron2's defaults.
        opts: KEY VALUE pairs.
        train, test: (json, image folder) of COCO-format data to use in place of the config's.

    Returns:
        CfgNode: frozen, with the number of classes of the named data unless ``opts`` sets it.

    Raises:
        UsageError: on a file that cannot be used, an unknown key or a wrong value.
        DatasetError, FileNotFoundError: as :func:`register_datasets`.
    """
    cfg = default_config()
    for path, values in read_config_file(config_file) if config_file else ():
        try:
            cfg.merge_from_other_cfg(CfgNode(with_floats(values, cfg)))
        except CONFIG_ERRORS as error:
            raise UsageError(f"{path}: {explain(error, cfg, flatten(values))}") from error
        prefer_given(cfg, flatten(values))
    opts = [opt for opt in opts if opt != "--"]
    _merge_overrides(cfg, opts)
    for split, source in (("TRAIN", train), ("TEST", test)):
        if source:
            cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"] = source
    complete(cfg, opts[::2])
    cfg.freeze()
    return cfg


def complete(cfg: CfgNode, overridden: Collection[str], *, check: bool = True) -> None:
    """Check the values of a config, register its data sets and count their classes.

    Args:
        cfg: a config with sasa_det's keys, changed in place: where it names data by their files,
            it gets their number of classes.
        overridden: full keys of the overrides, which stay as they are.
        check: as for :func:`register_datasets`.

    Raises:
        UsageError: on a wrong value.
        DatasetError, FileNotFoundError: as :func:`register_datasets`.
    """
    prefer_given(cfg, overridden)
    check_values(cfg)
    register_datasets(cfg, check=check)
    named = [cfg.DATASETS[split] for split in ("TRAIN", "TEST") if cfg.DATASETS[f"{split}_JSON"]]
    if cfg.DATASETS.IMAGE_FOLDER:
        named.append(cfg.DATASETS.TEST)
    for key in class_keys(cfg) if named else ():
        if key not in overridden:
            cfg.merge_from_list([key, num_classes_of(named[0])])


def prefer_given(cfg: CfgNode, given: Collection[str]) -> None:
    """Let a length in iterations or a learning rate that is given stand as it is.

    Without this, a length in epochs or a batch of reference from an earlier file would change it.

    Args:
        cfg: a config with sasa_det's keys, changed in place.
        given: full keys that a config file or the overrides have just set.
    """
    overruled = {**EPOCH_KEYS, "SOLVER.REFERENCE_BATCH": "SOLVER.BASE_LR"}
    for key, by in overruled.items():
        if by in given and key not in given:
            section, name = key.split(".")
            cfg[section][name] = type(cfg[section][name])()


def _merge_overrides(cfg: CfgNode, opts: Sequence[str]) -> None:
    flags = [opt for opt in opts[::2] if opt.startswith("--")]
    if flags:
        flag = flags[0].partition("=")[0]
        raise UsageError(f"flags come before the KEY VALUE pairs, got {flag} among these.")
    if len(opts) % 2:
        raise UsageError(f"config overrides must be KEY VALUE pairs, got {' '.join(opts)!r}.")
    known = all_keys(cfg)
    for key in opts[::2]:
        if key not in known:
            raise UsageError(unknown_key(key, cfg))
    defaults = flatten(cfg)
    floats = [type(defaults.get(key)) is float for key in opts[::2]]
    words = [
        f"{word}.0" if is_float and re.fullmatch(r"[+-]?\d+", str(word)) else word
        for word, is_float in zip(opts[1::2], floats, strict=True)
    ]
    try:
        cfg.merge_from_list([word for pair in zip(opts[::2], words, strict=True) for word in pair])
    except CONFIG_ERRORS as error:
        given = dict(zip(opts[::2], opts[1::2], strict=True))
        raise UsageError(explain(error, cfg, given)) from error


def register_datasets(cfg: CfgNode, *, check: bool = True) -> None:
    """Register the COCO-format files that a config names, under their json's path.

    Args:
        cfg: a config; its ``DATASETS.TRAIN`` and ``TEST`` are replaced where it names files. A
            frozen one must hold them already.
        check: False in the processes of a run whose data were checked before they were started.

    Raises:
        UsageError: if a json is named without its image folder, or the other way round.
        DatasetError, FileNotFoundError: if the files are no COCO-format data.
    """
    for split in ("TRAIN", "TEST"):
        json_file, images = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if bool(json_file) != bool(images):
            raise UsageError(
                f"DATASETS.{split}_JSON and DATASETS.{split}_IMAGES must be given together, got "
                f"{json_file!r} and {images!r}."
            )
        if json_file:
            register_coco(json_file, json_file, images, check=check, **image_options(cfg))
            if not cfg.is_frozen():
                cfg.DATASETS[split] = (json_file,)
    _register_image_folders(cfg, check)


def _register_image_folders(cfg: CfgNode, check: bool) -> None:
    data = cfg.DATASETS
    names = None
    if data.IMAGE_FOLDER:
        names = register_image_folder(data.IMAGE_FOLDER, check=False)
    if data.HOLDOUT:
        train = names[:1] if names else data.TRAIN
        if len(train) != 1:
            raise UsageError(
                f"DATASETS.TRAIN must name one data set with DATASETS.HOLDOUT, got {train!r}."
            )
        # A stored config names the part to train on.
        names = hold_out(train[0].removesuffix(":train"), data.HOLDOUT)
    if names is None:
        return
    if check:
        # Evaluation alone needs no images to train on: these are looked at before a run.
        check_image_folders(names[1:])
    if not cfg.is_frozen():
        data.TRAIN, data.TEST = ((name,) for name in names)


def class_keys(cfg: CfgNode) -> list[str]:
    """List the keys that hold the number of classes of a config's model."""
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return ["MODEL.RETINANET.NUM_CLASSES"]
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        return ["MODEL.ROI_HEADS.NUM_CLASSES"]
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        return ["MODEL.CLASSIFIER.NUM_CLASSES"]
    return []
