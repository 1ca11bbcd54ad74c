"""The command line and the config of a run, checked before any work is done."""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model

from ..config import add_sasa_config
from ..data.coco import check_registered, num_classes_of, register_coco
from ..data.mapper import jitter_and_crop_augmentations
from .trainer import build_optimizer

__all__ = ["UsageError", "argument_parser", "check_run", "load_config", "register_datasets"]

# What a run writes into its output folder.
_RUN_FILES = (
    "config.yaml",
    "metrics.json",
    "last_checkpoint",
    "log.txt*",
    "model_*.pth",
    "events.out.tfevents.*",
    "inference/**/*.*",
)


# What yacs, detectron2's assertions and this project raise over a config.
_CONFIG_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ValueError)


class UsageError(Exception):
    """A mistake in a command, a config or a data set, told in one sentence."""


def argument_parser() -> argparse.ArgumentParser:
    """Return detectron2's argument parser with this project's flags.

    Returns:
        argparse.ArgumentParser: beside detectron2's flags, ``--train`` and ``--test`` name a
        COCO-format json and its image folder, ``--overwrite`` allows to write over a run.
    """
    parser = default_argument_parser()
    for split in ("train", "test"):
        parser.add_argument(
            f"--{split}",
            nargs=2,
            metavar=("JSON", "IMAGES"),
            help=f"COCO-format json and image folder to {split} on, in place of DATASETS."
            f"{split.upper()}",
        )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove what an earlier run left in OUTPUT_DIR; without it, that is an error",
    )
    return parser


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
        UsageError: on a file that is missing or unreadable, an unknown key or a wrong value.
    """
    cfg = get_cfg()
    add_sasa_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise UsageError(f"--config-file {config_file} does not exist.")
        try:
            cfg.merge_from_file(config_file)
        except (*_CONFIG_ERRORS, yaml.YAMLError) as error:
            raise UsageError(f"{config_file}: {_explain(error, cfg)}") from error
    opts = [opt for opt in opts if opt != "--"]
    if len(opts) % 2:
        raise UsageError(f"config overrides must be KEY VALUE pairs, got {' '.join(opts)!r}.")
    known = _keys(cfg)
    for key in opts[::2]:
        if key not in known:
            raise UsageError(_unknown_key(key, known))
    try:
        cfg.merge_from_list(opts)
    except _CONFIG_ERRORS as error:
        raise UsageError(_explain(error, cfg)) from error
    for split, source in (("TRAIN", train), ("TEST", test)):
        if source:
            cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"] = source
    register_datasets(cfg)
    named = [cfg.DATASETS[split] for split in ("TRAIN", "TEST") if cfg.DATASETS[f"{split}_JSON"]]
    for key in _class_keys(cfg) if named else ():
        if key not in opts[::2]:
            cfg.merge_from_list([key, num_classes_of(named[0])])
    cfg.freeze()
    return cfg


def register_datasets(cfg: CfgNode) -> None:
    """Register the COCO-format files that a config names, under their json's path.

    Args:
        cfg: a config; its ``DATASETS.TRAIN`` and ``TEST`` are replaced where it names files. A
            frozen one must hold them already.

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
            register_coco(json_file, json_file, images)
            if not cfg.is_frozen():
                cfg.DATASETS[split] = (json_file,)


def check_run(
    cfg: CfgNode, *, eval_only: bool, resume: bool, overwrite: bool, machine_rank: int = 0
) -> None:
    """Check data, classes, device, model and output folder of a run before it starts.

    Args:
        cfg: the config of the run.
        eval_only: whether the run evaluates without training.
        resume: whether it continues in its output folder.
        overwrite: whether files of an earlier run may be removed.
        machine_rank: machines but the first leave the output folder, which they may share, alone.

    Raises:
        UsageError: in one sentence that names the key, the file or the folder.
        DatasetError, FileNotFoundError: likewise, for a data set.
    """
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UsageError("DATASETS.TRAIN names no data set; name one, or use --train.")
        check_registered(cfg.DATASETS.TRAIN, training=True)
    elif not cfg.DATASETS.TEST:
        raise UsageError("DATASETS.TEST names no data set; name one, or use --test.")
    check_registered(cfg.DATASETS.TEST, training=False)
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind != "coco":
            raise UsageError(
                f"DATASETS.TEST {name} must be a data set of evaluator_type 'coco', got {kind!r}."
            )
    _check_classes(cfg, [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST])
    _check_device(cfg)
    folder, weights = Path(cfg.OUTPUT_DIR), cfg.MODEL.WEIGHTS
    resume = resume and (folder / "last_checkpoint").is_file()
    if eval_only and not weights and not resume:
        raise UsageError(
            "--eval-only needs weights: set MODEL.WEIGHTS, or give --resume with an OUTPUT_DIR "
            "that holds a checkpoint."
        )
    if weights and not resume and "://" not in weights and not os.path.isfile(weights):
        raise UsageError(f"MODEL.WEIGHTS {weights} does not exist.")
    _check_model(cfg, eval_only)
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT_DIR {folder} is a file; it must be a folder.")
    if not resume and machine_rank == 0:
        _clear_output(folder, weights, eval_only, overwrite)


def _class_keys(cfg: CfgNode) -> list[str]:
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return ["MODEL.RETINANET.NUM_CLASSES"]
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        return ["MODEL.ROI_HEADS.NUM_CLASSES"]
    return []


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _check_classes(cfg: CfgNode, datasets: Sequence[str]) -> None:
    found = num_classes_of(datasets)
    for key in _class_keys(cfg):
        if _get(cfg, key) != found:
            raise UsageError(
                f"{key} is {_get(cfg, key)} but {', '.join(datasets)} has {found} classes; "
                f"set {key} {found}."
            )


def _check_device(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE} but no GPU is visible; add MODEL.DEVICE cpu to "
            "run on the CPU."
        )


def _check_model(cfg: CfgNode, eval_only: bool) -> None:
    """Build all that a config can get wrong once, on the CPU, before the run does."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        _check_registered(cfg)
        model = build_model(cfg)
        if not eval_only:
            build_optimizer(cfg, model)
            if cfg.INPUT.JITTER.ENABLED:
                jitter_and_crop_augmentations(cfg, is_train=True)
    except _CONFIG_ERRORS as error:
        raise UsageError(_explain(error, cfg)) from error


def _check_registered(cfg: CfgNode) -> None:
    for key, registry in (
        ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY),
    ):
        name = _get(cfg, key)
        if name not in registry:
            known = [known for known, _ in registry]
            raise ValueError(f"{key} {name} is not registered{_nearest(name, known)}")


def _clear_output(folder: Path, weights: str, eval_only: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds a run, or remove that run's files."""
    found = (path for pattern in _RUN_FILES for path in folder.glob(pattern))
    files = sorted(path for path in found if path.is_file())
    if files and not overwrite:
        raise UsageError(
            f"OUTPUT_DIR {folder} already holds {files[0].name} of a run; name another OUTPUT_DIR, "
            "continue the run with --resume, or allow to write over it with --overwrite."
        )
    if eval_only:
        # Evaluation writes no checkpoints and so leaves those that are there alone.
        files = [path for path in files if path.parent != folder]
    if weights and Path(weights).resolve() in [path.resolve() for path in files]:
        raise UsageError(
            f"MODEL.WEIGHTS {weights} would be removed by --overwrite; name another OUTPUT_DIR."
        )
    for path in files:
        path.unlink()


def _explain(error: Exception, cfg: CfgNode) -> str:
    """Turn an error of yacs or of a registry into one sentence with the nearest name."""
    message = str(error.args[0] if error.args else error).strip()
    if message.startswith(("Non-existent config key: ", "Non-existent key: ")):
        return _unknown_key(message.split(": ", 1)[1], _keys(cfg))
    return message.splitlines()[0] if message else repr(error)


def _unknown_key(key: str, known: list[str]) -> str:
    return f"config key {key} does not exist{_nearest(key, known)}"


def _nearest(name: str, known: list[str]) -> str:
    """End a sentence about an unknown name with the nearest known one, if there is any."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else "."


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_keys(value, f"{prefix}{key}."))
    return keys
