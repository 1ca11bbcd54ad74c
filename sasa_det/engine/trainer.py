"""The trainers of yaml configs and of LazyConfigs."""

import copy
import inspect
import logging
import os
import re
import weakref
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.preprocessing import warn_of_preprocessing
from ..checkpoint.reading import classes_in
from ..config.lazy import KEYS, LazySettings
from ..config.load import BUILD_ERRORS, explain_build_error
from ..config.values import check_schedule, warn_of_slow_averages
from ..data.catalog import follow_classes, warn_of_classes
from ..data.loader import TrainLoader, end_workers_with_parent
from ..errors import DatasetError, UsageError
from ..evaluation.validation_loss import validation_losses
from ..modeling.rcnn import check_res5_heads
from .checks import check_losses, check_weights
from .distributed import distribute, unsharded
from .hooks import (
    BestMetric,
    Checkpoints,
    EmaUpdate,
    Evaluation,
    ModelEma,
    PreciseBN,
    StopOnSignal,
    StopSignals,
)
from .model_options import apply_options, checkpoint_stages
from .optimizer import build_optimizer, max_gradient_norm
from .schedule import LearningRate, build_lr_scheduler, in_iterations, scale_learning_rate
from .tasks import task_of
from .train_loop import StepTrainer
from .writers import MetricWriters, ProgressPrinter, WandbRun

logger = logging.getLogger(__name__)

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(DefaultTrainer):
    """detectron2's default trainer with runs that resume bit for bit and fail loudly.

    Attributes:
        cfg (CfgNode): the config with all that depends on data and processes worked out: the seed,
            schedules in iterations, the learning rate of the batch.
        signals (StopSignals): asks the run to stop.
        ema (ModelEma or None): moving average of the weights.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config with sasa_det's keys.

        Raises:
            ValueError: if a value of the config does not fit the model or the processes.
            UsageError: if warmup or steps of the learning rate lie beyond the end, or
                ``TEST.BEST_METRIC`` names a loss that the model does not have.
        """
        # Not DefaultTrainer's, which builds everything its own way.
        TrainerBase.__init__(self)
        follow_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        cfg = _with_seed(self.auto_scale_workers(scale_learning_rate(cfg), comm.get_world_size()))
        loader = self.build_train_loader(cfg)
        self.cfg = cfg = in_iterations(cfg, loader.num_images)
        check_schedule(cfg)
        warn_of_slow_averages(cfg)
        model = self.build_model(cfg)
        distributed = distribute(model, shard=cfg.MODEL.FSDP)
        optimizer = self.build_optimizer(cfg, model)
        amp = cfg.SOLVER.AMP
        self.signals = StopSignals()
        self._trainer = StepTrainer(
            distributed,
            loader,
            optimizer,
            seed=cfg.SEED,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            precision=_PRECISIONS[amp.DTYPE] if amp.ENABLED else None,
            max_norm=max_gradient_norm(cfg),
            signals=self.signals,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = ModelEma(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.DECAY else None
        parts = {"trainer": weakref.proxy(self)}
        if self.ema is not None:
            parts["ema"] = self.ema
        self.checkpointer = Checkpointer(
            model, cfg.OUTPUT_DIR, allow=cfg.MODEL.WEIGHTS_ALLOW, **parts
        )
        check_losses(cfg, model, self._validation_batches())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._in_step = False
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest valid checkpoint of OUTPUT_DIR, or load ``MODEL.WEIGHTS``."""
        loaded = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        warn_of_preprocessing(self.cfg, loaded)
        warn_of_classes(classes_in(loaded), self._class_names())
        if resume and self.checkpointer.has_checkpoint():
            # The checkpoint holds the iteration that was done last.
            self.start_iter = self.iter + 1
            self._lr.start_at(self.start_iter)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Build the hooks in the order in which they run after a step."""
        cfg = self.cfg
        self._lr = LearningRate(self.scheduler)
        self._checkpoints = checkpoints = Checkpoints(
            self.checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            cfg.SOLVER.MAX_CHECKPOINTS,
            config=cfg.dump(),
        )
        best = None
        if cfg.TEST.BEST_METRIC:
            test = cfg.TEST
            best = BestMetric(test.BEST_METRIC, test.BEST_MODE, test.EARLY_STOPPING)
        evaluation = Evaluation(cfg.TEST.EVAL_PERIOD, self._evaluate, checkpoints, best)
        chain = [hooks.IterationTimer(), self._lr]
        if self.ema is not None:
            chain.append(EmaUpdate(self.ema))
        if cfg.TEST.PRECISE_BN.ENABLED and hooks.get_bn_modules(self.model):
            chain.append(self._precise_bn())
        # Saved before it is evaluated: what evaluation fails on can then be looked at.
        chain += [checkpoints, evaluation]
        if comm.is_main_process():
            # After evaluation, whose metrics they write.
            chain.append(MetricWriters(self.build_writers, cfg.OUTPUT_DIR))
        return [*chain, StopOnSignal(self.signals, checkpoints)]

    def build_writers(self) -> list:
        """Build detectron2's writers and, where ``WANDB_PROJECT`` is set, Weights & Biases'."""
        run = [WandbRun(self.cfg)] if self.cfg.WANDB_PROJECT else []
        _, *others = super().build_writers()
        return [ProgressPrinter(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH), *others, *run]

    def train(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            dict: results of the last evaluation; empty if there was none.

        Raises:
            StopTraining: if a signal or early stopping ended it, with everything saved.
            NonFiniteError: if a loss or a gradient is not finite.
            DatasetError: if an image cannot be read; with one process, the steps before are saved.
        """
        if self.start_iter >= self.max_iter:
            logger.info("The run in %s is complete.", self.cfg.OUTPUT_DIR)
        with self.signals.handled():
            try:
                TrainerBase.train(self, self.start_iter, self.max_iter)
            except DatasetError:
                self._save_last_step()
                raise
            finally:
                # The garbage collector would wait five seconds for the processes that read for it.
                batches = self._trainer._data_loader_iter
                if isinstance(batches, Generator):
                    batches.close()
        results = getattr(self, "_last_eval_results", {})
        # A run that had finished before evaluates nothing.
        if results and self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def run_step(self) -> None:
        self._in_step = True
        super().run_step()
        self._in_step = False

    def _save_last_step(self) -> None:
        """Save what was done before data failed, where the other processes need not take part."""
        # The images of evaluation and of batch norms' statistics are read after a step.
        done = self.iter - self._in_step
        if comm.get_world_size() == 1 and done >= self.start_iter:
            self.iter = done
            self._checkpoints.save_now()

    def _class_names(self) -> list[str]:
        return list(MetadataCatalog.get(self.cfg.DATASETS.TRAIN[0]).get("thing_classes", ()))

    def _evaluate(self) -> dict[str, Any]:
        cfg = self.cfg
        # Training's own module: evaluation needs no gradients to be exchanged.
        model = self.checkpointer.model
        results = self._test(model)
        if self.ema is not None:
            evaluators = [
                self.build_evaluator(cfg, name, results_folder(cfg, name, "ema"))
                for name in cfg.DATASETS.TEST
            ]
            with self.ema.applied():
                results["ema"] = self._test(model, evaluators)
        if cfg.TEST.VALIDATION_LOSS:
            batches = self.signals.between(self._validation_batches())
            with unsharded(model):
                results["validation"] = validation_losses(model, batches)
        if not comm.is_main_process():
            return {}
        self._last_eval_results = results
        return results

    def _test(self, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """Evaluate, which changes no weight, until a signal comes."""
        with self.signals.at_once():
            return dict(self.test(self.cfg, model, evaluators))

    def _validation_batches(self):
        return task_of(self.cfg).validation_batches()

    def _precise_bn(self) -> PreciseBN:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)
        num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
        return PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return apply_options(super().build_model(cfg), cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return task_of(cfg).train_loader()

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return task_of(cfg).test_loader(dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        # Processes do not evaluate the same number of images.
        with unsharded(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        folder = output_folder or results_folder(cfg, dataset_name)
        return task_of(cfg).evaluator(dataset_name, folder)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 leaves it out.
        state["_trainer"] = self._trainer.state_dict()
        state["classes"] = self._class_names()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or detectron2's trainer.

        Raises:
            DatasetError: if the training data are others than those of the state.
        """
        classes = state_dict.get("classes", self._class_names())
        if classes != self._class_names():
            raise DatasetError(
                f"the classes of the training data are {', '.join(self._class_names())}, and were "
                f"{', '.join(classes)} when the checkpoint was saved: they must be the same"
            )
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("The checkpoint holds no optimizer state: the optimizer starts anew.")


def _with_seed(cfg: CfgNode) -> CfgNode:
    """Give a run without a seed one, the same in all processes."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    return cfg


def results_folder(cfg: CfgNode, dataset_name: str, *parts: str) -> str:
    """Return the folder of what evaluation writes about a data set."""
    # Data named on the command line is registered under its path.
    folder = re.sub(r"[^\w.-]+", "_", dataset_name.strip("/"))
    return os.path.join(cfg.OUTPUT_DIR, "inference", *parts, folder)


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
        return end_workers_with_parent(instantiate(_test_loader(cfg, dataset_name)))

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
