"""The trainers of yaml configs and of LazyConfigs."""

import copy
import logging
import weakref
from collections.abc import Generator
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, default_writers, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint import Checkpointer
from ..checkpoint.preprocessing import warn_of_preprocessing
from ..checkpoint.reading import classes_in
from ..config.load import BUILD_ERRORS, explain_build_error
from ..config.options import RunOptions, plain
from ..config.read_keys import mark_read
from ..config.values import check_schedule, warn_of_slow_averages
from ..data.catalog import category_ids, follow_classes, warn_of_classes
from ..data.loader import TrainLoader
from ..errors import DatasetError, UsageError
from ..evaluation.coco import coco_evaluator
from ..evaluation.validation_loss import validation_losses
from ..modeling import with_augmentation
from .checks import check_losses
from .distributed import distribute, unsharded
from .expected_results import verify
from .hooks import (
    BestMetric,
    Checkpoints,
    EmaUpdate,
    Evaluation,
    ModelEma,
    PreciseBN,
    StopOnSignal,
)
from .model_options import apply_options
from .optimizer import build_optimizer, max_gradient_norm, with_clipping
from .schedule import LearningRate, build_lr_scheduler, in_iterations, scale_learning_rate
from .signals import StopSignals, interruptible
from .tasks import task_of
from .train_loop import StepTrainer
from .writers import MetricWriters, ProgressPrinter, WandbRun

logger = logging.getLogger(__name__)

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer with exact resuming, moving averages and checks.

    Attributes:
        options (RunOptions): the options of the run, with the final seed, lengths in iterations and
            learning rate.
        cfg (CfgNode): the config with the same values.
        signals (StopSignals): the signals that stop the run.
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
        # Not the constructor of DefaultTrainer, which builds another data loader and optimizer.
        TrainerBase.__init__(self)
        mark_read("*")
        options = RunOptions.read(cfg)
        follow_classes([*options.train, *options.test])
        scaled = scale_learning_rate(options)
        config = self.auto_scale_workers(scaled.config, comm.get_world_size())
        options = RunOptions.read(config)
        if options.seed < 0:
            options = options.replace(seed=comm.shared_random_seed())
        loader = self.build_train_loader(options.config)
        self.options = options = in_iterations(options, loader.num_images)
        self.cfg = options.config
        check_schedule(options)
        warn_of_slow_averages(options)
        model = self.build_model(self.cfg)
        logger.info("Model:\n%s", model)
        distributed = distribute(model, shard=options.fsdp, **self.ddp_options(self.cfg))
        optimizer = self.build_optimizer(self.cfg, model)
        self.signals = StopSignals()
        self._trainer = StepTrainer(
            distributed,
            loader,
            optimizer,
            seed=options.seed,
            accumulation_steps=options.accumulation_steps,
            precision=_PRECISIONS[options.amp_dtype] if options.amp_enabled else None,
            max_norm=max_gradient_norm(options),
            signals=self.signals,
        )
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        self.ema = ModelEma(model, options.ema_decay) if options.ema_decay else None
        parts = {"trainer": weakref.proxy(self)}
        if self.ema is not None:
            parts["ema"] = self.ema
        self.checkpointer = Checkpointer(
            model, options.output_dir, allow=options.weights_allow, **parts
        )
        check_losses(options, model, self._validation_batches())
        self.start_iter, self.max_iter = 0, options.max_iter
        self._in_step = False
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the output folder's newest valid checkpoint, or load the initial weights."""
        loaded = self.checkpointer.resume_or_load(self.options.weights, resume=resume)
        warn_of_preprocessing(self.cfg, loaded)
        warn_of_classes(classes_in(loaded), self._class_names())
        if resume and self.checkpointer.has_checkpoint():
            # The checkpoint holds the iteration that was done last.
            self.start_iter = self.iter + 1
            self._lr.start_at(self.start_iter)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Build the hooks in the order in which they run after a step."""
        options = self.options
        self._lr = LearningRate(self.scheduler)
        self._checkpoints = checkpoints = Checkpoints(
            self.checkpointer,
            options.checkpoint_period,
            options.max_checkpoints,
            config=options.dump(),
        )
        best = None
        if options.best_metric:
            best = BestMetric(options.best_metric, options.best_mode, options.early_stopping)
        evaluation = Evaluation(options.eval_period, self._evaluate, checkpoints, best)
        chain = [hooks.IterationTimer(), self._lr]
        if self.ema is not None:
            chain.append(EmaUpdate(self.ema))
        if options.precise_bn and hooks.get_bn_modules(self.model):
            chain.append(self._precise_bn())
        # Checkpoints come first, so that they exist if the evaluation fails.
        chain += [checkpoints, evaluation]
        if comm.is_main_process():
            # They write the metrics of the evaluation.
            chain.append(MetricWriters(self.build_writers, options.output_dir, options.log_period))
        return [*chain, StopOnSignal(self.signals, checkpoints)]

    def build_writers(self) -> list:
        """Build detectron2's writers and, where ``WANDB_PROJECT`` is set, Weights & Biases'."""
        options = self.options
        run = [WandbRun(options)] if options.wandb_project else []
        _, *others = default_writers(options.output_dir, self.max_iter)
        return [ProgressPrinter(self.max_iter, options.total_batch_size), *others, *run]

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
            logger.info("The run in %s is complete.", self.options.output_dir)
        with self.signals.handled():
            try:
                TrainerBase.train(self, self.start_iter, self.max_iter)
            except DatasetError:
                self._save_last_step()
                raise
            finally:
                # The garbage collector would wait five seconds for the workers of the data loader.
                batches = self._trainer._data_loader_iter
                if isinstance(batches, Generator):
                    batches.close()
        results = getattr(self, "_last_eval_results", {})
        # A finished run that is resumed has no results.
        if results and self.options.expected_results and comm.is_main_process():
            verify(self.cfg, results)
        return results

    def run_step(self) -> None:
        self._in_step = True
        super().run_step()
        self._in_step = False

    def _save_last_step(self) -> None:
        """Save the last complete step after a data error in a run of one process."""
        # Images are also read after a step, by evaluation and for the statistics of batch norms.
        done = self.iter - self._in_step
        if comm.get_world_size() == 1 and done >= self.start_iter:
            self.iter = done
            self._checkpoints.save_now()

    def _class_names(self) -> list[str]:
        return list(MetadataCatalog.get(self.options.train[0]).get("thing_classes", ()))

    def _evaluate(self) -> dict[str, Any]:
        # Without the wrapper of training, which exchanges gradients.
        model = self.checkpointer.model
        results = self._test(model)
        if self.ema is not None:
            task = task_of(self.options)
            evaluators = [
                self.build_evaluator(self.cfg, name, task.results_folder(name, "ema"))
                for name in self.options.test
            ]
            with self.ema.applied():
                results["ema"] = self._test(model, evaluators)
        if self.options.tta_enabled and self.iter + 1 >= self.max_iter:
            # It takes as long as several evaluations. As in detectron2, at the end alone.
            augmented = self.signals.at_once(lambda: self.test_with_TTA(self.cfg, model))
            results.update(augmented)
        if self.options.validation_loss:
            batches = self.signals.between(self._validation_batches())
            with unsharded(model):
                results["validation"] = validation_losses(model, batches)
        if not comm.is_main_process():
            return {}
        self._last_eval_results = results
        return results

    def _test(self, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """Evaluate until a signal arrives; evaluation does not change weights."""
        return self.signals.at_once(lambda: dict(self.test(self.cfg, model, evaluators)))

    def _validation_batches(self):
        return task_of(self.options).validation_batches()

    def _precise_bn(self) -> PreciseBN:
        options = self.options
        loader = self.build_train_loader(options.replace(num_workers=0).config)
        return PreciseBN(options.eval_period, self.model, loader, options.precise_bn_iters)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return apply_options(build_model(cfg), RunOptions.read(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return task_of(RunOptions.read(cfg)).train_loader()

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return task_of(RunOptions.read(cfg)).test_loader(dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict[str, Any]:
        """Evaluate a model on the data sets to test on.

        Args:
            cfg: the config of the run.
            model: evaluated in eval mode; its mode is restored afterwards.
            evaluators: one for each data set; :meth:`build_evaluator` builds them if None.

        Returns:
            dict: the results, by data set if there are several; empty except in the first process.
        """
        results: dict[str, Any] = {}
        names = RunOptions.read(cfg).test
        if isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        # Processes do not evaluate the same number of images.
        with unsharded(model):
            for name, evaluator in zip(names, evaluators or [None] * len(names), strict=True):
                loader = cls.build_test_loader(cfg, name)
                evaluator = interruptible(evaluator or cls.build_evaluator(cfg, name))
                results[name] = inference_on_dataset(model, loader, evaluator)
                if comm.is_main_process():
                    logger.info("Results on %s:", name)
                    print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate a model with test-time augmentation, as detectron2's ``tools/train_net.py``.

        Args:
            cfg: the config of the run, with ``TEST.AUG.ENABLED``.
            model: as for :meth:`test`.

        Returns:
            dict: as of :meth:`test`, with ``_TTA`` behind the names.
        """
        options = RunOptions.read(cfg)
        task = task_of(options)
        evaluators = [
            cls.build_evaluator(cfg, name, task.results_folder(name, "TTA"))
            for name in options.test
        ]
        # The augmentation resizes the images from their own size, and not for a second time.
        unresized = cfg.clone()
        unresized.defrost()
        unresized.INPUT.MIN_SIZE_TEST = 0
        unresized.freeze()
        logger.info("Evaluating with test-time augmentation.")
        results = cls.test(unresized, with_augmentation(cfg, model), evaluators)
        return {f"{name}_TTA": values for name, values in results.items()}

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        task = task_of(RunOptions.read(cfg))
        return task.evaluator(dataset_name, output_folder or task.results_folder(dataset_name))

    @classmethod
    def ddp_options(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return arguments of detectron2's ``create_ddp_model``."""
        return {}

    @classmethod
    def has_own_evaluator(cls, cfg: CfgNode) -> bool:
        """Tell whether the evaluator is not this project's, so that its metrics are not known."""
        return cls.build_evaluator.__func__ is not Trainer.build_evaluator.__func__

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # detectron2 0.6 leaves it out.
        state["_trainer"] = self._trainer.state_dict()
        state["classes"] = self._class_names()
        if ids := category_ids(self.options.train[0]):
            state["category_ids"] = ids
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or detectron2's trainer.

        Raises:
            DatasetError: if the state is from other training data.
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


class LazyTrainer(Trainer):
    """The trainer of LazyConfigs, whose calls build the model, the data and the optimizer."""

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        options = RunOptions.read(cfg)
        return apply_options(instantiate(cfg.model).to(options.device), options)

    @classmethod
    def build_optimizer(cls, cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
        options = RunOptions.read(cfg)
        call = copy.deepcopy(cfg.optimizer)
        if options.fsdp and "fused" in call:
            call.fused = False  # as build_optimizer has it
        call.params.model = model
        return with_clipping(instantiate(call), options)

    @classmethod
    def build_lr_scheduler(cls, cfg: DictConfig, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        try:
            multiplier = instantiate(cfg.lr_multiplier)
        except BUILD_ERRORS as error:  # as of steps beyond the end, which epochs may give
            raise UsageError(explain_build_error(error)) from error
        return LRMultiplier(optimizer, multiplier, max_iter=RunOptions.read(cfg).max_iter)

    @classmethod
    def ddp_options(cls, cfg: DictConfig) -> dict[str, Any]:
        return dict(cfg.train.get("ddp", {}))

    @classmethod
    def has_own_evaluator(cls, cfg: DictConfig) -> bool:
        target = OmegaConf.select(cfg, "dataloader.evaluator._target_")
        return super().has_own_evaluator(cfg) or plain(target) != plain(coco_evaluator)

    @classmethod
    def auto_scale_workers(cls, cfg: DictConfig, num_workers: int) -> DictConfig:
        return cfg  # LazyConfigs have no SOLVER.REFERENCE_WORLD_SIZE
