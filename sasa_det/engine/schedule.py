"""Lengths in epochs, learning rate scaling and learning rate schedules."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler

from ..config.options import EPOCHS, RunOptions
from ..config.values import WARMUP_THEN_COSINE
from .optimizer import WARMUP_ITERS

logger = logging.getLogger(__name__)


def in_iterations(options: RunOptions, num_images: int) -> RunOptions:
    """Turn the lengths that a config gives in epochs into iterations.

    Args:
        options: of the config.
        num_images: images of the training set.

    Returns:
        RunOptions: each length in epochs above 0 turned into iterations,
            round(epochs * num_images / batch size), at least 1, and set to 0.
    """
    lengths = {}
    for in_epochs, name in EPOCHS.items():
        epochs = getattr(options, in_epochs)
        if not epochs:
            continue
        several = isinstance(epochs, (tuple, list))
        iterations = tuple(
            max(1, round(length * num_images / options.total_batch_size))
            for length in (epochs if several else (epochs,))
        )
        lengths |= {name: iterations if several else iterations[0], in_epochs: type(epochs)()}
        logger.info(
            "%s: %s, which is %s epochs of %d images.",
            *(options.key(name), lengths[name], epochs, num_images),
        )
    return options.replace(**lengths)


def scale_learning_rate(options: RunOptions) -> RunOptions:
    """Scale the learning rate linearly from the batch it is meant for to the batch of the run.

    Args:
        options: of the config; ``reference_batch`` 0 turns it off.

    Returns:
        RunOptions: with ``base_lr`` times total_batch_size / reference_batch.
    """
    reference, batch = options.reference_batch, options.total_batch_size
    if not reference or batch == reference:
        return options
    scaled = options.replace(base_lr=options.base_lr * batch / reference)
    logger.info(
        "%s: %g for a batch of %d, scaled from %g for %d (%s 0 turns this off).",
        *(options.key("base_lr"), scaled.base_lr, batch, options.base_lr, reference),
        options.key("reference_batch"),
    )
    return scaled


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

    Beside detectron2's there is "WarmupThenCosineLR" (appendix A.2): for the W iterations of
    warmup the rate of iteration t is BASE_LR (f + (1 - f) t / W), f being ``WARMUP_FACTOR``, then
    BASE_LR (1 + cos(pi (t - W) / (T - W))) / 2 up to iteration T. In detectron2's WarmupCosineLR
    the cosine begins with the warmup, so that BASE_LR is never reached.

    Args:
        cfg: a config with sasa_det's keys, lengths in iterations.
        optimizer: with the rates to schedule.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != WARMUP_THEN_COSINE:
        return build_detectron2_scheduler(cfg, optimizer)
    warmup = solver.WARMUP_ITERS / solver.MAX_ITER
    schedule = CosineParamScheduler(1.0, 0.0)
    if warmup:
        rise = LinearParamScheduler(solver.WARMUP_FACTOR, 1.0)
        schedule = CompositeParamScheduler(
            [rise, schedule], [warmup, 1 - warmup], ["rescaled", "rescaled"]
        )
    return LRMultiplier(optimizer, schedule, max_iter=solver.MAX_ITER)


def warmup_scheduler(
    scheduler: ParamScheduler,
    *,
    max_iter: int,
    warmup_iters: int,
    warmup_epochs: float = 0.0,
    warmup_factor: float = 0.001,
    warmup_method: str = "linear",
) -> WarmupParamScheduler:
    """Add a warmup in iterations to a schedule, as yaml configs do; for LazyConfigs.

    Args:
        scheduler: the schedule without warmup.
        max_iter: iterations of the run.
        warmup_iters: iterations of the warmup.
        warmup_epochs: the same in epochs, which :class:`sasa_det.engine.Trainer` turns into
            ``warmup_iters``; 0 uses ``warmup_iters``.
        warmup_factor: factor of the learning rate at the start.
        warmup_method: "linear" or "constant".
    """
    if warmup_iters >= max_iter:
        logger.warning(
            "lr_multiplier.warmup_iters should be below train.max_iter, %d, got %d: the learning "
            "rate only rises to that of the end of the schedule, which is 0 for a cosine.",
            max_iter,
            warmup_iters,
        )
    length = min(warmup_iters / max_iter, 1.0)
    return WarmupParamScheduler(scheduler, warmup_factor, length, warmup_method)


class LearningRate(HookBase):
    """Sets the learning rate of the next step.

    The rate depends on the iteration and the config only. It is not saved, so that a run can be
    resumed with another rate. A parameter group with "warmup_iters" has a warmup of its own: its
    rate in the schedule is multiplied by iteration / warmup_iters until that is 1.
    """

    def __init__(self, scheduler: LRScheduler):
        """
        Args:
            scheduler: detectron2's, whose rates are a function of ``last_epoch``, the iteration.
        """
        self._scheduler = scheduler
        groups = scheduler.optimizer.param_groups
        self._largest = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        # Before a checkpoint is loaded, which may have another.
        self._warmups = [group.get(WARMUP_ITERS, 0) for group in groups]
        self._set_rates()

    def start_at(self, iteration: int) -> None:
        """Set the rates of an iteration."""
        self._scheduler.last_epoch = iteration
        self._set_rates()

    def after_step(self) -> None:
        rate = self._scheduler.optimizer.param_groups[self._largest]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self._scheduler.step()
        self._set_rates()

    def _set_rates(self) -> None:
        iteration, groups = self._scheduler.last_epoch, self._scheduler.optimizer.param_groups
        rates = self._scheduler.get_lr()
        for group, rate, warmup in zip(groups, rates, self._warmups, strict=True):
            group["lr"] = rate * iteration / warmup if iteration < warmup else rate
