"""The config of a run: put together, and checked before any work is done."""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from ..config import add_sasa_config
from ..data.coco import num_classes_of, register_coco
from ..data.image_folder import check_image_folders, hold_out, register_image_folder
from ..data.loader import check_shares
from .config_file import read_config_file
from .config_keys import CONFIG_ERRORS, all_keys, explain, flatten, unknown_key
from .config_values import check_schedule, check_values
from .detection import image_options
from .errors import UsageError
from .metric_names import check_metrics
from .model_check import check_model
from .output_folder import Resume, check_output, is_resumed
from .output_lock import output_lock
from .schedule import prefer_given
from .tasks import task_of

__all__ = ["check_processes", "check_run", "class_keys", "load_config", "register_datasets"]

# More is a slip of the finger, and would be read for ever before the first step.
_LARGEST_BATCH = 10**6


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
    cfg = get_cfg()
    add_sasa_config(cfg)
    for path, values in read_config_file(config_file) if config_file else ():
        try:
            cfg.merge_from_other_cfg(CfgNode(values))
        except CONFIG_ERRORS as error:
            raise UsageError(f"{path}: {explain(error, cfg, flatten(values))}") from error
        prefer_given(cfg, flatten(values))
    opts = [opt for opt in opts if opt != "--"]
    _merge_overrides(cfg, opts)
    for split, source in (("TRAIN", train), ("TEST", test)):
        if source:
            cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"] = source
    check_values(cfg)
    register_datasets(cfg)
    named = [cfg.DATASETS[split] for split in ("TRAIN", "TEST") if cfg.DATASETS[f"{split}_JSON"]]
    if cfg.DATASETS.IMAGE_FOLDER:
        named.append(cfg.DATASETS.TEST)
    for key in class_keys(cfg) if named else ():
        if key not in opts[::2]:
            cfg.merge_from_list([key, num_classes_of(named[0])])
    cfg.freeze()
    return cfg


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
    try:
        cfg.merge_from_list(opts)
    except CONFIG_ERRORS as error:
        given = dict(zip(opts[::2], opts[1::2], strict=True))
        raise UsageError(explain(error, cfg, given)) from error
    prefer_given(cfg, opts[::2])


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


def check_run(
    cfg: CfgNode,
    *,
    eval_only: bool = False,
    resume: Resume = None,
    overwrite: bool = False,
    leader: bool = True,
    num_processes: int = 1,
    check: Callable[..., None] = check_model,
) -> None:
    """Check schedule, data, classes, device, weights, model and output folder of a run.

    Nothing is written, but for the lock in an output folder that is there already.

    Args:
        cfg: the config of the run.
        eval_only: whether the run evaluates without training.
        resume: what ``--resume`` asks for.
        overwrite: whether files of an earlier run may be removed.
        leader: False in the processes that leave the output folder to another one, as of
            :func:`sasa_det.engine.output_folder.claim_output`.
        num_processes: of the run, on all machines.
        check: tells mistakes in what the config builds, as :func:`check_model`.

    Raises:
        UsageError: in one sentence that names the key, the file or the folder.
        CheckpointError, DatasetError, FileNotFoundError: likewise, for weights and data.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if leader:
        with output_lock(folder) if folder.is_dir() else nullcontext():
            check_output(cfg, eval_only=eval_only, resume=resume, overwrite=overwrite)
    if not eval_only:
        check_schedule(cfg)
        _check_batch(cfg, num_processes)
        _check_sharding(cfg, num_processes)
    _check_device(cfg)
    _check_norms(cfg, num_processes)
    _check_data(cfg, eval_only)
    resumed = is_resumed(folder, resume)
    weights = "" if resumed else cfg.MODEL.WEIGHTS
    if eval_only and not weights and not resumed:
        raise UsageError(
            "--eval-only needs weights: set MODEL.WEIGHTS, or give --resume with an OUTPUT_DIR "
            "that holds a checkpoint."
        )
    if cfg.WANDB_PROJECT and find_spec("wandb") is None:
        raise UsageError(
            f"WANDB_PROJECT is {cfg.WANDB_PROJECT} but wandb is not installed; install it or give "
            'WANDB_PROJECT "".'
        )
    check(cfg, eval_only=eval_only, weights=weights, num_processes=num_processes)


def check_processes(
    cfg: CfgNode, num_gpus: int, num_machines: int = 1, dist_url: str = "auto"
) -> None:
    """Check that the processes of a run find their devices and each other.

    Args:
        cfg: the config of the run.
        num_gpus: processes on this machine.
        num_machines: machines that take part.
        dist_url: address at which the processes meet; "auto" on one machine.

    Raises:
        UsageError: naming ``MODEL.DEVICE``, ``--num-gpus`` or ``--dist-url``.
    """
    _check_device(cfg)
    device = cfg.MODEL.DEVICE
    if device != "cpu" and num_gpus > torch.cuda.device_count():
        raise UsageError(
            f"--num-gpus must be at most the {torch.cuda.device_count()} GPUs of this machine, "
            f"got {num_gpus}."
        )
    if num_gpus * num_machines == 1:
        return
    if torch.device(device).index is not None:
        raise UsageError(
            f"MODEL.DEVICE must be cpu or cuda for a run of several processes, got {device!r}."
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise UsageError(
                "--dist-url must be an address that all machines reach, as in tcp://host:port, if "
                f"--num-machines is above 1, which is {num_machines}, got 'auto'."
            )
    elif not re.fullmatch(r"tcp://[^/\s]+:\d+|file:///\S+", dist_url):
        raise UsageError(
            f"--dist-url must be auto, tcp://host:port or file:///path, got {dist_url!r}."
        )


def _check_batch(cfg: CfgNode, num_processes: int) -> None:
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size > _LARGEST_BATCH:
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH must be at most {_LARGEST_BATCH}, got {batch_size}."
        )
    try:
        check_shares(batch_size, num_processes, cfg.SOLVER.ACCUMULATION_STEPS)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_sharding(cfg: CfgNode, num_processes: int) -> None:
    if not cfg.MODEL.FSDP:
        return
    if num_processes == 1:
        raise UsageError(
            "MODEL.FSDP must be False in a run of one process, which has nobody to share the "
            "model with."
        )
    for key in ("CHANNELS_LAST", "COMPILE"):
        if cfg.MODEL[key]:
            raise UsageError(f"MODEL.{key} must be False if MODEL.FSDP is True: they do not mix.")


def _check_device(cfg: CfgNode) -> None:
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise UsageError(
            f"MODEL.DEVICE is {name} but no GPU is visible; set MODEL.DEVICE to cpu to run without."
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"MODEL.DEVICE is {name} but {torch.cuda.device_count()} GPUs are visible, which are "
            "numbered from 0."
        )


def _check_norms(cfg: CfgNode, num_processes: int) -> None:
    if num_processes == 1 or not cfg.MODEL.DEVICE.startswith("cpu"):
        return
    for key, value in flatten(cfg).items():
        if key.startswith("MODEL.") and key.endswith(".NORM") and value == "SyncBN":
            raise UsageError(
                f"{key} must not be SyncBN where several processes train on CPUs, for PyTorch has "
                "it for GPUs alone; naiveSyncBN is detectron2's own."
            )


def _check_data(cfg: CfgNode, eval_only: bool) -> None:
    task = task_of(cfg)
    for split in ("TRAIN", "TEST"):
        files = cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        if cfg.MODEL.LOAD_PROPOSALS and len(files) != len(cfg.DATASETS[split]):
            raise UsageError(
                f"DATASETS.PROPOSAL_FILES_{split} must hold one file for each data set of "
                f"DATASETS.{split} with MODEL.LOAD_PROPOSALS True, got {files!r}."
            )
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise UsageError(
                "DATASETS.TRAIN names no data set; name one, or use --train (--data to classify)."
            )
        task.check_data(cfg, cfg.DATASETS.TRAIN, True)
    elif not cfg.DATASETS.TEST:
        raise UsageError("DATASETS.TEST names no data set; name one, or use --test.")
    task.check_data(cfg, cfg.DATASETS.TEST, False)
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type")
        if kind != task.evaluator_type:
            raise UsageError(
                f"DATASETS.TEST {name} must be a data set of evaluator_type "
                f"{task.evaluator_type!r} for a {cfg.MODEL.META_ARCHITECTURE}, got {kind!r}."
            )
    datasets = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    found = num_classes_of(datasets)
    for key in class_keys(cfg):
        given = flatten(cfg)[key]
        if given != found:
            raise UsageError(
                f"{key} is {given} but {', '.join(datasets)} has {found} classes; set {key} "
                f"{found}."
            )
    check_metrics(cfg)


def class_keys(cfg: CfgNode) -> list[str]:
    """List the keys that hold the number of classes of a config's model."""
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return ["MODEL.RETINANET.NUM_CLASSES"]
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        return ["MODEL.ROI_HEADS.NUM_CLASSES"]
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        return ["MODEL.CLASSIFIER.NUM_CLASSES"]
    return []
