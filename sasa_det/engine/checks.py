"""The checks of a run before its first step."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.reading import classes_in
from ..checkpoint.sources import locate
from ..config.keys import flatten
from ..config.load import BUILD_ERRORS, class_keys, explain_build_error
from ..config.values import check_schedule
from ..data.catalog import check_same_classes, num_classes_of
from ..data.loader import check_shares
from ..errors import UsageError, nearest
from ..evaluation.validation_loss import validation_losses
from ..modeling.batch_norm import check_batch_norms
from ..modeling.rcnn import check_res5_heads
from .distributed import unsharded
from .model_options import checkpoint_stages
from .optimizer import build_optimizer
from .tasks import task_of


def check_model(
    cfg: CfgNode, *, eval_only: bool, weights: str = "", num_processes: int = 1
) -> None:
    """Build model, mappers and, for training, the optimizer of a config on the CPU.

    Args:
        cfg: the config of a run.
        eval_only: whether the run evaluates without training.
        weights: what the run starts from, which is loaded into the model; "" for nothing.
        num_processes: of the run, on all machines.

    Raises:
        UsageError: in one sentence, from the error that building raised.
        CheckpointError: if the weights cannot be used or do not fit the model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        model = build_model(cfg)
        check_res5_heads(model)
        if not eval_only:
            _check_single_values(cfg, model, num_processes)
        checkpoint_stages(model.backbone, cfg.MODEL.ACTIVATION_CHECKPOINTING)
        task = task_of(cfg)
        task.build_mapper(is_train=False)
        if not eval_only:
            task.build_mapper(is_train=True)
            build_optimizer(cfg, model)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
    check_weights(cfg, model, weights, strict=eval_only)


def _check_single_values(cfg: CfgNode, model: nn.Module, num_processes: int) -> None:
    """Check the batch norms of a run whose images are all of one size."""
    if cfg.MODEL.META_ARCHITECTURE == "Classifier":
        side = cfg.INPUT.CLASSIFICATION.CROP_SIZE
    elif cfg.INPUT.JITTER.ENABLED:
        side = cfg.INPUT.JITTER.CROP_SIZE
    else:
        return
    synchronized = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    if num_processes > 1 and any(isinstance(m, synchronized) for m in model.modules()):
        return
    batch_size = cfg.SOLVER.IMS_PER_BATCH // (num_processes * cfg.SOLVER.ACCUMULATION_STEPS)
    if batch_size == 1:  # or there is more than one value
        check_batch_norms(model, batch_size, side)


def check_weights(cfg: CfgNode, model: nn.Module, weights: str, *, strict: bool) -> None:
    """Load the weights that a run starts from into its model.

    Args:
        cfg: the config of the run.
        model: is not to be used afterwards.
        weights: "" for none.
        strict: whether they must fill the whole model.

    Raises:
        UsageError: if they do not exist.
        CheckpointError: if they cannot be used or do not fit the model.
        DatasetError: if the data to test on have other classes than a whole model.
    """
    if weights:
        if not locate(weights).path.is_file():
            raise UsageError(f"MODEL.WEIGHTS {weights} does not exist.")
        loaded = Checkpointer(model, strict=strict, allow=cfg.MODEL.WEIGHTS_ALLOW).load(weights)
        classes = classes_in(loaded)
        if strict and classes is not None:
            check_same_classes(cfg.DATASETS.TEST, classes, f"MODEL.WEIGHTS {weights}")


# What begins the names of losses on the data to test on.
_LOSSES = "validation/"


def check_metrics(cfg: CfgNode) -> None:
    """Check that evaluations will have the metrics that a config names.

    Args:
        cfg: the config of a run, whose data sets are registered.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` or ``TEST.EXPECTED_RESULTS`` and the nearest metric.
    """
    # A data set that is named twice has its results once.
    tests = list(dict.fromkeys(cfg.DATASETS.TEST))
    metrics = {name: task_of(cfg).metrics(_class_names(name)) for name in tests}
    if len(tests) == 1:
        known = metrics[tests[0]]
    else:
        known = [f"{name}/{metric}" for name in tests for metric in metrics[name]]
    _check_expected(cfg.TEST.EXPECTED_RESULTS, known if len(tests) == 1 else [])
    best = cfg.TEST.BEST_METRIC
    if best.startswith(_LOSSES) and cfg.TEST.VALIDATION_LOSS:
        return  # which check_losses looks at
    if cfg.MODEL.EMA.DECAY:
        known = known + [f"ema/{metric}" for metric in known]
    if best and best not in known:
        example = known[0] if known else "bbox/AP"
        raise UsageError(
            f"TEST.BEST_METRIC must be a metric of the evaluations, as {example}, with "
            f"MODEL.EMA.DECAY ema/{example}, or with TEST.VALIDATION_LOSS {_LOSSES}total_loss, "
            f"got {best}{nearest(best, known)}"
        )


def check_losses(cfg: CfgNode, model: nn.Module, batches: Iterable[Any]) -> None:
    """Check that a loss that ``TEST.BEST_METRIC`` names is one of the model's.

    Args:
        cfg: the config of a run.
        model: of the run.
        batches: of the data to test on, the first of which is read if a loss is named.

    Raises:
        UsageError: naming ``TEST.BEST_METRIC`` and the nearest loss.
    """
    best = cfg.TEST.BEST_METRIC
    if not best.startswith(_LOSSES):
        return
    with unsharded(model):
        losses = validation_losses(model, itertools.islice(batches, 1))
    known = [f"{_LOSSES}{name}" for name in losses]
    if best not in known:
        raise UsageError(
            f"TEST.BEST_METRIC must be one of the losses {', '.join(known)}, got "
            f"{best}{nearest(best, known)}"
        )


def _class_names(dataset: str) -> Sequence[str]:
    return MetadataCatalog.get(dataset).thing_classes


def _check_expected(results: Sequence[Any], known: Sequence[str]) -> None:
    for expected in results:
        match expected:
            case (str(task), str(metric), float() | int(), float() | int()):
                if f"{task}/{metric}" in known:
                    continue
        raise UsageError(
            "TEST.EXPECTED_RESULTS must hold [task, metric, value, tolerance], as "
            "['bbox', 'AP', 38.5, 0.2], of the metrics of one data set in DATASETS.TEST, got "
            f"{expected!r}."
        )


# More is a slip of the finger, and would be read for ever before the first step.
_LARGEST_BATCH = 10**6
# Likewise: the machine would have no room for other processes.
_MOST_WORKERS = 1000


def check_run(
    cfg: CfgNode,
    *,
    eval_only: bool = False,
    resumed: bool = False,
    num_processes: int = 1,
    check: Callable[..., None] = check_model,
) -> None:
    """Check schedule, data, classes, device, weights and model of a run; nothing is written.

    Args:
        cfg: the config of the run.
        eval_only: whether the run evaluates without training.
        resumed: whether the run continues from a checkpoint of its output folder.
        num_processes: of the run, on all machines.
        check: builds what the config describes and reports mistakes, as :func:`check_model`.

    Raises:
        UsageError: in one sentence that names the key or the file.
        CheckpointError, DatasetError, FileNotFoundError: likewise, for weights and data.
    """
    if not eval_only:
        check_schedule(cfg)
        _check_batch(cfg, num_processes)
        _check_sharding(cfg, num_processes)
    _check_device(cfg)
    _check_norms(cfg, num_processes)
    _check_data(cfg, eval_only)
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
    batch_size, num_workers = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS
    for key, value, limit in (
        ("SOLVER.IMS_PER_BATCH", batch_size, _LARGEST_BATCH),
        ("DATALOADER.NUM_WORKERS", num_workers, _MOST_WORKERS),
    ):
        if value > limit:
            raise UsageError(f"{key} must be at most {limit}, got {value}.")
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
        task.check_data(cfg.DATASETS.TRAIN, training=True)
    elif not cfg.DATASETS.TEST:
        raise UsageError("DATASETS.TEST names no data set; name one, or use --test.")
    task.check_data(cfg.DATASETS.TEST, training=False)
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
