"""One run: training with evaluation, or evaluation alone."""

import argparse
import sys
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..data.coco import DatasetError
from .denormals import flush_denormals
from .logs import log_to
from .setup import UsageError, check_run, load_config, register_datasets
from .trainer import Trainer

__all__ = ["evaluate", "run", "train"]


def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train the model of a config and evaluate it as ``TEST.EVAL_PERIOD`` and at the end.

    Args:
        cfg: the config of the run; its output folder receives config.yaml, log.txt, metrics.json,
            TensorBoard events and checkpoints.
        resume: continue from the last checkpoint in the output folder, if there is one.

    Returns:
        dict: results of the last evaluation; empty if there was none.
    """
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", {})


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of ``MODEL.WEIGHTS`` on ``DATASETS.TEST``.

    Args:
        cfg: the config of the run.
        resume: evaluate the last checkpoint of the output folder, if there is one.

    Returns:
        dict: results by task and metric.
    """
    model = Trainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    verify_results(cfg, results)
    return results


def run(args: argparse.Namespace) -> int:
    """Carry out a command line of :func:`sasa_det.engine.argument_parser`.

    Args:
        args: the parsed command line.

    Returns:
        int: exit status, 0 or, after a mistake told in one sentence, 2.
    """
    flush_denormals()
    log_to(None)
    try:
        cfg = load_config(args.config_file, args.opts, args.train, args.test)
        check_run(
            cfg,
            eval_only=args.eval_only,
            resume=args.resume,
            overwrite=args.overwrite,
            machine_rank=args.machine_rank,
        )
    except (UsageError, DatasetError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    launch(
        _worker,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )
    return 0


def _worker(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    register_datasets(cfg)
    log_to(cfg.OUTPUT_DIR, comm.get_rank())
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    return train(cfg, resume=args.resume)
