"""The trainer of a LazyConfig."""

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.loader import TrainLoader
from ..modeling.rcnn import check_res5_heads
from .errors import UsageError
from .lazy_config import KEYS, LazySettings
from .model_check import BUILD_ERRORS, check_weights, explain_build_error
from .model_options import apply_options, checkpoint_stages
from .optimizer import max_gradient_norm
from .trainer import Trainer, results_folder

__all__ = ["LazyTrainer", "check_calls"]

logger = logging.getLogger(__name__)


class LazyTrainer(Trainer):
    """The trainer whose model, data, optimizer and schedule are made by a LazyConfig's calls."""

    @classmethod
    def build_model(cls, cfg: LazySettings) -> nn.Module:
        model = instantiate(cfg.lazy.model).to(cfg.MODEL.DEVICE)
        logger.info("Model:\n%s", model)
        return apply_options(model, cfg)

    @classmethod
    def build_optimizer(cls, cfg: LazySettings, model: nn.Module) -> torch.optim.Optimizer:
        lazy = _worked_out(cfg)
        if cfg.MODEL.FSDP and "fused" in lazy.optimizer:
            lazy.optimizer.fused = False  # as build_optimizer has it
        lazy.optimizer.params.model = model
        optimizer = instantiate(lazy.optimizer)
        if max_gradient_norm(cfg) is None:
            optimizer = maybe_add_gradient_clipping(cfg, optimizer)
        return optimizer

    @classmethod
    def build_lr_scheduler(
        cls, cfg: LazySettings, optimizer: torch.optim.Optimizer
    ) -> LRMultiplier:
        try:
            multiplier = instantiate(_worked_out(cfg).lr_multiplier)
        except BUILD_ERRORS as error:  # as of steps beyond the end, which epochs may give
            raise UsageError(explain_build_error(error)) from error
        return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: LazySettings) -> TrainLoader:
        return instantiate(_train_loader(cfg))

    @classmethod
    def build_test_loader(cls, cfg: LazySettings, dataset_name: str):
        return instantiate(_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(
        cls, cfg: LazySettings, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        return instantiate(_evaluator(cfg, dataset_name, output_folder))

    def _validation_batches(self) -> Iterator[list[dict[str, Any]]]:
        train, test = self.cfg.lazy.dataloader.train, self.cfg.lazy.dataloader.test
        mapper = {
            **train.mapper,
            "augmentations": test.mapper.augmentations,
            "recompute_boxes": False,
        }
        for name in self.cfg.DATASETS.TEST:
            yield from instantiate({**_test_loader(self.cfg, name), "mapper": mapper})


def check_calls(
    cfg: LazySettings, *, eval_only: bool, weights: str = "", num_processes: int = 1
) -> None:
    """Make all that a LazyConfig describes but the data, on the CPU, to tell its mistakes.

    Args:
        cfg: the config of a run.
        eval_only: whether the run evaluates without training.
        weights: what the run starts from, which is loaded into the model; "" for nothing.
        num_processes: of the run, on all machines.

    Raises:
        UsageError: in one sentence, from the error that was raised.
        CheckpointError: if the weights cannot be used or do not fit the model.
    """
    loaders = cfg.lazy.dataloader
    try:
        model = instantiate(cfg.lazy.model).to("cpu")
        check_res5_heads(model)
        checkpoint_stages(model.backbone, cfg.MODEL.ACTIVATION_CHECKPOINTING)
        for name in cfg.DATASETS.TEST[:1]:
            instantiate(loaders.test.mapper)
            _check_call("dataloader.test", _test_loader(cfg, name))
            _check_call("dataloader.test.dataset", loaders.test.dataset)
            _check_call("dataloader.evaluator", _evaluator(cfg, name))
        if not eval_only:
            LazyTrainer.build_lr_scheduler(cfg, LazyTrainer.build_optimizer(cfg, model))
            instantiate(loaders.train.mapper)
            _check_call("dataloader.train", _train_loader(cfg))
            _check_call("dataloader.train.dataset", loaders.train.dataset)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
    check_weights(cfg, model, weights, strict=eval_only)


def _worked_out(cfg: LazySettings) -> DictConfig:
    """Return the LazyConfig with the rate of the batch and the lengths in iterations.

    What refers to them in the config follows.
    """
    lazy = copy.deepcopy(cfg.lazy)
    for key in ("BASE_LR", "MAX_ITER", "WARMUP_ITERS"):
        name = KEYS[f"SOLVER.{key}"]
        if OmegaConf.select(lazy, name) is not None:
            OmegaConf.update(lazy, name, cfg.SOLVER[key])
    return lazy


def _train_loader(cfg: LazySettings) -> dict[str, Any]:
    """Return the call that makes the training loader of a run."""
    return {
        **cfg.lazy.dataloader.train,
        "seed": max(cfg.SEED, 0),
        "parts": cfg.SOLVER.ACCUMULATION_STEPS,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda"),
    }


def _test_loader(cfg: LazySettings, dataset_name: str) -> dict[str, Any]:
    loader = cfg.lazy.dataloader.test
    return {**loader, "dataset": {**loader.dataset, "names": dataset_name}}


def _evaluator(
    cfg: LazySettings, dataset_name: str, output_folder: str | None = None
) -> dict[str, Any]:
    return {
        **cfg.lazy.dataloader.evaluator,
        "dataset_name": dataset_name,
        "output_dir": output_folder or results_folder(cfg, dataset_name),
    }


def _check_call(name: str, call: Mapping[str, Any]) -> None:
    """Check the arguments of a call that reads data, without making it."""
    arguments = {key: value for key, value in call.items() if key != "_target_"}
    target = call["_target_"]
    try:
        inspect.signature(locate(target) if isinstance(target, str) else target).bind(**arguments)
    except TypeError as error:
        raise UsageError(f"{name}: {error}.") from error
