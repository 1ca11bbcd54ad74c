"""One run: training with evaluation, or evaluation alone."""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..checkpoint import Checkpointer
from ..data.class_order import classes_in, follow_classes
from ..files import write_text
from .config_changes import log_changes
from .denormals import flush_denormals
from .errors import USAGE_ERRORS, tell
from .launch import first_to_say, is_elastic_restart, launch, started_by_torchrun
from .logs import log_to
from .model_check import check_model
from .output_folder import claim_output, discard_output
from .setup import check_processes, check_run, load_config, register_datasets
from .signals import StopTraining
from .step import NonFiniteError
from .trainer import Trainer

__all__ = ["YAML", "ConfigKind", "evaluate", "run", "train"]

logger = logging.getLogger(__name__)


class ConfigKind(NamedTuple):
    """What runs of one kind of config do in a way of their own.

    Attributes:
        load: makes the config of config file, overrides and the data named on the command line.
        check: tells mistakes in what the config builds, as :func:`check_model`.
        tell: prints a mistake and returns the exit status, as :func:`sasa_det.engine.errors.tell`.
        trainer: of the config.
    """

    load: Callable[..., CfgNode]
    check: Callable[..., None]
    tell: Callable[[Exception], int]
    trainer: type[Trainer]


YAML = ConfigKind(load_config, check_model, tell, Trainer)


def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train the model of a config and evaluate it as ``TEST.EVAL_PERIOD`` and at the end.

    Args:
        cfg: the config of the run; its output folder receives config.yaml, log.txt, metrics.json,
            TensorBoard events and checkpoints.
        resume: continue from the newest valid checkpoint in the output folder, if there is one.

    Returns:
        dict: results of the last evaluation; empty if there was none.

    Raises:
        CheckpointError: if there is no valid checkpoint, or ``MODEL.WEIGHTS`` does not fit.
        StopTraining, NonFiniteError: as :meth:`Trainer.train`.
    """
    return _ready(cfg, resume, Trainer).train()


def _ready(cfg: CfgNode, resume: bool, kind: type[Trainer]) -> Trainer:
    """Build a trainer and load what it starts from."""
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of ``MODEL.WEIGHTS`` on ``DATASETS.TEST``.

    Args:
        cfg: the config of the run.
        resume: evaluate the newest valid checkpoint of the output folder instead.

    Returns:
        dict: results by task and metric.

    Raises:
        CheckpointError: if the weights cannot be used or do not fill the whole model.
    """
    return _evaluate(cfg, _filled(cfg, resume, Trainer), Trainer)


def _filled(cfg: CfgNode, resume: bool, trainer: type[Trainer]) -> nn.Module:
    """Build a model and fill it with the weights to evaluate."""
    model = trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR, strict=True)
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    follow_classes(cfg.DATASETS.TEST, classes_in(loaded), "the weights")
    return model


def _evaluate(cfg: CfgNode, model: nn.Module, trainer: type[Trainer]) -> dict[str, Any]:
    results = trainer.test(cfg, model)
    verify_results(cfg, results)
    return results


def run(args: argparse.Namespace, kind: ConfigKind = YAML) -> int:
    """Carry out a command line of :func:`sasa_det.engine.argument_parser`.

    Args:
        args: the parsed command line.
        kind: of the config that it names.

    Returns:
        int: exit status: 0; 1 if the run failed; 2 after a mistake told in one sentence; 143 or
        130 if SIGTERM, SIGUSR1 or Ctrl-C ended it with everything saved.
    """
    flush_denormals()
    log_to(None)
    if is_elastic_restart():
        # torchrun repeats the command that it was given.
        args.resume, args.overwrite = "auto", False
    try:
        cfg = kind.load(args.config_file, args.opts, args.train, args.test)
        if started_by_torchrun():
            check_processes(cfg, int(os.environ["LOCAL_WORLD_SIZE"]))
            return launch(_torchrun_worker, 1, device=cfg.MODEL.DEVICE, args=(kind, cfg, args))
        check_processes(cfg, args.num_gpus, args.num_machines, args.dist_url)
        processes = args.num_gpus * args.num_machines
        leader = args.machine_rank == 0
        with _prepared(kind, cfg, args, leader, processes) as resume:
            status = launch(
                _worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                device=cfg.MODEL.DEVICE,
                args=(kind, cfg, args.eval_only, resume),
            )
            return _ended(status, cfg, args) if leader else status
    except USAGE_ERRORS as error:
        return kind.tell(error)


@contextmanager
def _prepared(
    kind: ConfigKind, cfg: CfgNode, args: argparse.Namespace, leader: bool, num_processes: int
) -> Iterator[bool]:
    """Check a run and have its output folder in a block; yields whether it is resumed."""
    options = {"eval_only": args.eval_only, "resume": args.resume, "overwrite": args.overwrite}
    check_run(cfg, **options, leader=leader, num_processes=num_processes, check=kind.check)
    with claim_output(cfg, **options, leader=leader) as resume:
        yield resume


def _torchrun_worker(kind: ConfigKind, cfg: CfgNode, args: argparse.Namespace) -> int:
    """Check the run in the first process, whose word the others take."""
    with ExitStack() as stack:
        status, resume = 0, False
        if comm.is_main_process():
            try:
                prepared = _prepared(kind, cfg, args, True, comm.get_world_size())
                resume = stack.enter_context(prepared)
            except USAGE_ERRORS as error:
                status = kind.tell(error)
        status, resume = comm.all_gather((status, resume))[0]
        if status:
            return status
        status = _worker(kind, cfg, args.eval_only, resume)
        return _ended(status, cfg, args) if comm.is_main_process() else status


def _ended(status: int, cfg: CfgNode, args: argparse.Namespace) -> int:
    """Let a mistake that was found too late leave no run behind that would refuse the next one."""
    if status == 2 and not (args.resume or args.overwrite):
        discard_output(Path(cfg.OUTPUT_DIR))
    return status


def _worker(kind: ConfigKind, cfg: CfgNode, eval_only: bool, resume: bool) -> int:
    """Do the work of one process and return its exit status."""
    flush_denormals()
    register_datasets(cfg, check=False)
    log_to(cfg.OUTPUT_DIR, comm.get_rank())
    _begin(cfg, eval_only, resume)
    try:
        loaded = (_filled if eval_only else _ready)(cfg, resume, kind.trainer)
    except USAGE_ERRORS as error:
        return _tell_once(kind, error)
    _store_config(cfg, eval_only)
    try:
        if eval_only:
            _evaluate(cfg, loaded, kind.trainer)
        else:
            loaded.train()
    except StopTraining as stop:
        logger.info("Training ends before its last iteration: %s; everything is saved.", stop)
        return stop.status
    except (NonFiniteError, *USAGE_ERRORS) as error:
        _tell_once(kind, error)
        return 1
    return 0


def _tell_once(kind: ConfigKind, error: Exception) -> int:
    """Tell an error that several processes of the run may have met, and return the status 2."""
    return kind.tell(error) if first_to_say(str(error)) else 2


def _store_config(cfg: CfgNode, eval_only: bool) -> None:
    """Write config.yaml, once it is known that the checkpoint is of the config's data."""
    stored = Path(cfg.OUTPUT_DIR, "config.yaml")
    # The config of a run that is evaluated stays: it is what the run is resumed with.
    if comm.is_main_process() and not (eval_only and stored.exists()):
        write_text(stored, cfg.dump())


def _begin(cfg: CfgNode, eval_only: bool, resume: bool) -> None:
    """Log what runs where, and seed what is random before the first step."""
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Config:\n%s", cfg.dump())
    if comm.is_main_process() and resume and not eval_only:
        log_changes(cfg)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if precision := cfg.get("FLOAT32_PRECISION"):  # later detectron2
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
