"""The checks of a run before its first step."""

import itertools
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.reading import classes_in
from ..checkpoint.sources import locate
from ..config.keys import flatten
from ..config.load import BUILD_ERRORS, explain_build_error
from ..config.options import RunOptions
from ..config.values import check_schedule
from ..data.catalog import check_same_classes, metadata_of, num_classes_of
from ..data.loader import check_shares
from ..errors import UsageError, nearest
from ..evaluation.validation_loss import validation_losses
from ..modeling.attention_options import check_norm
from ..modeling.batch_norm import check_batch_norms
from ..modeling.rcnn import check_res5_heads
from ..modeling.test_time_augmentation import check_augmentation
from .distributed import unsharded
from .tasks import Task, task_of


def check_model(
    options: RunOptions,
    trainer: Any,
    *,
    eval_only: bool,
    weights: str = "",
    num_processes: int = 1,
) -> None:
    """Build model, mappers and, for training, the optimizer of a run on the CPU.

    Args:
        options, trainer, eval_only, num_processes: as for :func:`check_run`.
        weights: what the run starts from, which is loaded into the model; "" for nothing.

    Raises:
        UsageError, CheckpointError, DatasetError: as :func:`check_run`.
    """
    try:
        if options.tta_enabled:
            check_augmentation(options.config)
        _check_norms(options, num_processes)
        options = options.replace(device="cpu")
        model = trainer.build_model(options.config)
        check_res5_heads(model)
        task = task_of(options)
        task.check_mapper(is_train=False)
        if not eval_only:
            _check_single_values(task, model, num_processes)
            task.check_mapper(is_train=True)
            optimizer = trainer.build_optimizer(options.config, model)
            if options.is_lazy:  # check_schedule is for the others
                trainer.build_lr_scheduler(options.config, optimizer)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
    if not weights:
        return
    key = f"{options.key('weights')} {weights}"
    if not locate(weights).path.is_file():
        raise UsageError(f"{key} does not exist.")
    checkpointer = Checkpointer(model, strict=eval_only, allow=options.weights_allow)
    classes = classes_in(checkpointer.load(weights))
    if eval_only and classes is not None:
        check_same_classes(options.test, classes, key)


def _check_single_values(task: Task, model: nn.Module, num_processes: int) -> None:
    """Check the batch norms of a run whose images are all of one size."""
    options, side = task.options, task.fixed_size
    synchronized = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    if not side or (
        num_processes > 1 and any(isinstance(m, synchronized) for m in model.modules())
    ):
        return
    batch_size = options.total_batch_size // (num_processes * options.accumulation_steps)
    if batch_size == 1:  # or there is more than one value
        check_batch_norms(model, batch_size, side)


# The ``evaluator_type`` of data sets whose metrics have known names.
_KNOWN_METRICS = ("coco", "classification")
# What begins the names of losses on the data to test on.
_LOSSES = "validation/"


def check_metrics(options: RunOptions) -> None:
    """Check that evaluations will have the metrics that a config names.

    Args:
        options: of a run whose data sets are registered.

    Raises:
        UsageError: naming the key of the best metric or ``TEST.EXPECTED_RESULTS`` and the nearest
            metric.
    """
    # A data set that is named twice has its results once.
    tests = list(dict.fromkeys(options.test))
    classes = {name: MetadataCatalog.get(name).thing_classes for name in tests}
    metrics = {name: task_of(options).metrics(classes[name]) for name in tests}
    if len(tests) == 1:
        known = metrics[tests[0]]
    else:
        known = [f"{name}/{metric}" for name in tests for metric in metrics[name]]
    expected = known if len(tests) == 1 else []
    if options.tta_enabled:
        expected = expected + [metric.replace("/", "_TTA/", 1) for metric in expected]
    _check_expected(options.expected_results, expected)
    best = options.best_metric
    if best.startswith(_LOSSES) and options.validation_loss:
        return  # which check_losses looks at
    if options.ema_decay:
        known = known + [f"ema/{metric}" for metric in known]
    if best and best not in known:
        example = known[0] if known else "bbox/AP"
        raise UsageError(
            f"{options.key('best_metric')} must be a metric of the evaluations, as {example}, with "
            f"{options.key('ema_decay')} ema/{example}, or with {options.key('validation_loss')} "
            f"{_LOSSES}total_loss, got {best}{nearest(best, known)}"
        )


def check_losses(options: RunOptions, model: nn.Module, batches: Iterable[Any]) -> None:
    """Check that a loss that is to choose the best checkpoint is one of the model's.

    Args:
        options: of the run.
        model: of the run.
        batches: of the data to test on, the first of which is read if a loss is named.

    Raises:
        UsageError: naming the key of the best metric and the nearest loss.
    """
    best = options.best_metric
    if not best.startswith(_LOSSES):
        return
    with unsharded(model):
        losses = validation_losses(model, itertools.islice(batches, 1))
    known = [f"{_LOSSES}{name}" for name in losses]
    if best not in known:
        raise UsageError(
            f"{options.key('best_metric')} must be one of the losses {', '.join(known)}, got "
            f"{best}{nearest(best, known)}"
        )


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


# A larger batch is probably a typing error, and reading it would take hours.
_LARGEST_BATCH = 10**6
# Likewise: the machine would have no room for other processes.
_MOST_WORKERS = 1000


def check_run(
    options: RunOptions,
    trainer: Any,
    *,
    eval_only: bool = False,
    resumed: bool = False,
    num_processes: int = 1,
) -> None:
    """Check schedule, data, classes, device, weights and model of a run; nothing is written.

    Args:
        options: of the run.
        trainer: the class of the run's trainer, whose builders are tried.
        eval_only: whether the run evaluates without training.
        resumed: whether the run continues from a checkpoint of its output folder.
        num_processes: of the run, on all machines.

    Raises:
        UsageError: in one sentence that names the key or the file.
        CheckpointError, DatasetError, FileNotFoundError: likewise, for weights and data.
    """
    if not eval_only:
        check_schedule(options)
        _check_batch(options, num_processes)
        _check_sharding(options, num_processes)
    check_device(options)
    _check_data(options, eval_only)
    if not trainer.has_own_evaluator(options.config):
        _check_evaluation(options)
    weights = "" if resumed else options.weights
    if eval_only and not weights and not resumed:
        raise UsageError(
            f"--eval-only needs weights: set {options.key('weights')}, or give --resume if "
            f"{options.key('output_dir')} contains a checkpoint."
        )
    if options.wandb_project and find_spec("wandb") is None:
        key = options.key("wandb_project")
        raise UsageError(
            f"{key} is {options.wandb_project} but wandb is not installed; install it or give "
            f"{options.setting(key, repr(''))}."
        )
    check_model(options, trainer, eval_only=eval_only, weights=weights, num_processes=num_processes)


def check_processes(
    options: RunOptions, num_gpus: int, num_machines: int = 1, dist_url: str = "auto"
) -> None:
    """Check that the processes of a run find their devices and each other.

    Args:
        options: of the run.
        num_gpus: processes on this machine.
        num_machines: machines that take part.
        dist_url: address at which the processes meet; "auto" on one machine.

    Raises:
        UsageError: naming the key of the device, ``--num-gpus`` or ``--dist-url``.
    """
    check_device(options)
    device = options.device
    if device != "cpu" and num_gpus > torch.cuda.device_count():
        raise UsageError(
            f"--num-gpus must be at most the {torch.cuda.device_count()} GPUs of this machine, "
            f"got {num_gpus}."
        )
    if num_gpus * num_machines == 1:
        return
    if torch.device(device).index is not None:
        raise UsageError(
            f"{options.key('device')} must be cpu or cuda for a run of several processes, got "
            f"{device!r}."
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


def _check_batch(options: RunOptions, num_processes: int) -> None:
    for field, limit in (("total_batch_size", _LARGEST_BATCH), ("num_workers", _MOST_WORKERS)):
        value = getattr(options, field)
        if value > limit:
            raise UsageError(f"{options.key(field)} must be at most {limit}, got {value}.")
    names = options.key("total_batch_size"), options.key("accumulation_steps")
    try:
        check_shares(
            options.total_batch_size, num_processes, options.accumulation_steps, names=names
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_sharding(options: RunOptions, num_processes: int) -> None:
    if not options.fsdp:
        return
    key = options.key("fsdp")
    if num_processes == 1:
        raise UsageError(
            f"{key} must be False in a run of one process, because there is no other process to "
            "share the model with."
        )
    for field in ("channels_last", "compile"):
        if getattr(options, field):
            raise UsageError(
                f"{options.key(field)} must be False if {key} is True: the two cannot be combined."
            )


def check_device(options: RunOptions) -> None:
    """Raise UsageError if the device of a config is not there, or not known."""
    key, name = options.key("device"), options.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{key} must be cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{key} must be cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise UsageError(f"{key} is {name} but no GPU is visible; set {key} to cpu to run without.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"{key} is {name} but {torch.cuda.device_count()} GPUs are visible, which are numbered "
            "from 0."
        )


def _check_norms(options: RunOptions, num_processes: int) -> None:
    section = "model" if options.is_lazy else "MODEL"
    for key, value in flatten(options.config[section], f"{section}.").items():
        # In a LazyConfig, it may also be a function or a class.
        if not key.lower().endswith(".norm") or not isinstance(value, str):
            continue
        check_norm(key, value)
        if value == "SyncBN" and num_processes > 1 and options.device.startswith("cpu"):
            raise UsageError(
                f"{key} must not be SyncBN where several processes train on CPUs, for PyTorch has "
                "it for GPUs alone; naiveSyncBN is detectron2's own."
            )


def _check_data(options: RunOptions, eval_only: bool) -> None:
    task = task_of(options)
    for split in ("train", "test"):
        names, field = getattr(options, split), f"proposal_files_{split}"
        files = getattr(options, field)
        if options.load_proposals and len(files) != len(names):
            raise UsageError(
                f"{options.key(field)} must hold one file for each data set of "
                f"{options.key(split)} with {options.key('load_proposals')} True, got {files!r}."
            )
    if not eval_only:
        if not options.train:
            raise UsageError(
                f"{options.key('train')} names no data set; name one, or use --train (--data to "
                "classify)."
            )
        task.check_data(options.train, training=True)
    elif not options.test:
        raise UsageError(f"{options.key('test')} names no data set; name one, or use --test.")
    task.check_data(options.test, training=False)
    datasets = [*(() if eval_only else options.train), *options.test]
    key = options.class_key
    if not key:  # data sets to segment may have no classes of things
        datasets = [name for name in datasets if metadata_of(name).get("thing_classes")]
    found = num_classes_of(datasets) if datasets else None
    if key and options.num_classes != found:
        raise UsageError(
            f"{key} is {options.num_classes} but {', '.join(datasets)} has {found} classes; set "
            f"{options.setting(key, found)}."
        )


def _check_evaluation(options: RunOptions) -> None:
    task = task_of(options)
    kinds = {name: MetadataCatalog.get(name).get("evaluator_type") for name in options.test}
    for name, kind in kinds.items():
        if kind not in task.evaluator_types:
            allowed = " or ".join(map(repr, task.evaluator_types))
            raise UsageError(
                f"{options.key('test')} {name} must be a data set of evaluator_type {allowed} for "
                f"{options.meta_architecture}, got {kind!r}: set it in the metadata of the data "
                "set."
            )
    if all(kind in _KNOWN_METRICS for kind in kinds.values()):
        check_metrics(options)
