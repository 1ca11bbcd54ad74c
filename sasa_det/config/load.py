"""Reading the config of a run, and registering the data sets that it names."""

import re
from collections.abc import Collection, Sequence

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from fvcore.common.registry import Registry

from ..config_files import find_config
from ..data.catalog import num_classes_of
from ..data.coco import register_coco
from ..data.image_folder import check_image_folders, hold_out, register_image_folder
from ..data.sources import open_data
from ..data_arguments import data_format
from ..errors import UsageError, first_line, nearest
from .defaults import default_config
from .keys import CONFIG_ERRORS, all_keys, explain, flatten, unknown_key, with_floats
from .options import EPOCHS, YAML_KEYS, RunOptions
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

# Keys, and those by which they are reset.
_OVERRULED = {
    **{YAML_KEYS[epochs]: YAML_KEYS[iterations] for epochs, iterations in EPOCHS.items()},
    YAML_KEYS["reference_batch"]: YAML_KEYS["base_lr"],
}

# Overrides with which a config is used without its data, which need not be on this computer.
WITHOUT_DATA = (
    *("DATASETS.TRAIN_JSON", "", "DATASETS.TRAIN_IMAGES", ""),
    *("DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", ""),
    *("DATASETS.IMAGE_FOLDER", "", "DATASETS.HOLDOUT", "0.0"),
)

# The errors of models, optimizers and mappers that cannot be built from a config.
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
    message = first_line(error)
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


def load_config(
    config_file: str = "",
    opts: Sequence[str] = (),
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
) -> CfgNode:
    """Read a config file, overrides and the data sets of the command line.

    Args:
        config_file: path of a yaml file, or name of one of the project's configs; "" for
            detectron2's defaults.
        opts: KEY VALUE pairs.
        train, test: words that name data to use instead of the config's, as
            :func:`sasa_det.data.sources.open_data` takes them.

    Returns:
        CfgNode: frozen, with the number of classes of the named data unless ``opts`` sets it.

    Raises:
        UsageError: on a file that cannot be used, an unknown key or a wrong value.
        DatasetError, FileNotFoundError: as :func:`register_datasets`.
    """
    cfg = default_config()
    for path, values in read_config_file(find_config(config_file)) if config_file else ():
        try:
            cfg.merge_from_other_cfg(CfgNode(with_floats(values, cfg)))
        except CONFIG_ERRORS as error:
            raise UsageError(f"{path}: {explain(error, cfg, flatten(values))}") from error
        _reset(cfg, overruled(flatten(values)))
    opts = [opt for opt in opts if opt != "--"]
    merge_overrides(cfg, opts)
    for split, source in (("TRAIN", train), ("TEST", test)):
        if source:
            for name in (split, f"{split}_JSON"):
                if (key := f"DATASETS.{name}") in opts[::2] and cfg.DATASETS[name]:
                    raise UsageError(f"--{split.lower()} and {key} both name data; leave one out.")
            words = [*map(str, source), ""]
            cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"] = words[:2]
    _reset(cfg, overruled(opts[::2]))
    check_values(flatten(cfg))
    cfg.freeze()
    return complete(RunOptions.read(cfg), opts[::2]).config


def _reset(cfg: CfgNode, keys: Collection[str]) -> None:
    for key in keys:
        section, name = key.split(".")
        cfg[section][name] = type(cfg[section][name])()


def complete(
    options: RunOptions, overridden: Collection[str] = (), *, check: bool = True
) -> RunOptions:
    """Register the data sets of a config and count their classes.

    Args:
        options: of a config whose values are checked.
        overridden: full keys of the overrides, which stay as they are.
        check: as for :func:`register_datasets`.

    Returns:
        RunOptions: with the names of data sets that the config gives by their files, and with their
        number of classes.

    Raises:
        UsageError, DatasetError, FileNotFoundError: as :func:`register_datasets`.
    """
    names = register_datasets(options, check=check)
    options = options.replace(**names)
    if not options.class_key or options.class_key in overridden:
        return options
    for split in ("train", "test"):
        if getattr(options, f"{split}_json"):
            return options.replace(num_classes=num_classes_of(names[split]))
    if options.image_folder:
        options = options.replace(num_classes=num_classes_of(names["test"]))
    return options


def overruled(given: Collection[str]) -> list[str]:
    """List the yaml keys that must be reset for others that are given to stand as they are.

    Without this, a length in epochs or a batch of reference from an earlier file would change them.

    Args:
        given: yaml keys that a config file or the overrides have just set.
    """
    return [key for key, by in _OVERRULED.items() if by in given and key not in given]


def check_pairs(opts: Sequence[str]) -> None:
    """Raise UsageError unless words can be KEY VALUE pairs."""
    flags = [opt for opt in opts[::2] if opt.startswith("--")]
    if flags:
        flag = flags[0].partition("=")[0]
        raise UsageError(f"flags come before the KEY VALUE pairs, got {flag} among these.")
    if len(opts) % 2:
        raise UsageError(f"config overrides must be KEY VALUE pairs, got {' '.join(opts)!r}.")


def merge_overrides(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Change a config by KEY VALUE pairs; a UsageError tells of a key or value it cannot take."""
    check_pairs(opts)
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


def register_datasets(options: RunOptions, *, check: bool = True) -> dict[str, tuple[str, ...]]:
    """Register the data sets whose files a config names, under the path of the file.

    Args:
        options: of the config.
        check: False in the processes of a run whose data were checked before they were started.

    Returns:
        dict: the names of these data sets, by "train" and "test".

    Raises:
        UsageError: if a json is named without its image folder, or the other way round.
        DatasetError, FileNotFoundError: if the data cannot be used.
    """
    names = {}
    for split in ("train", "test"):
        keys = f"{split}_json", f"{split}_images"
        path, images = (getattr(options, key) for key in keys)
        if bool(path) != bool(images) and (not path or data_format(path) == "coco"):
            raise UsageError(
                f"{' and '.join(map(options.key, keys))} must be given together, got "
                f"{path!r} and {images!r}."
            )
        if path:
            json_file, images = open_data(path, images, split, reuse=not check)
            register_coco(json_file, json_file, images, check=check, **options.image_options())
            names[split] = (json_file,)
    return names | _register_image_folders(options, names.get("train", options.train), check)


def _register_image_folders(
    options: RunOptions, train: Sequence[str], check: bool
) -> dict[str, tuple[str, ...]]:
    names = None
    if options.image_folder:
        names = register_image_folder(options.image_folder, check=False)
    if options.holdout:
        train = names[:1] if names else train
        if len(train) != 1:
            raise UsageError(
                f"DATASETS.TRAIN must name one data set with DATASETS.HOLDOUT, got {train!r}."
            )
        # A stored config names the part to train on.
        names = hold_out(train[0].removesuffix(":train"), options.holdout)
    if names is None:
        return {}
    if check:
        # Evaluation alone needs no images to train on: these are looked at before a run.
        check_image_folders(names[1:])
    return {split: (name,) for split, name in zip(("train", "test"), names, strict=True)}
