"""What the trainer takes beside the model: its loader, checks and hooks against detectron2's."""

import tempfile
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import SimpleTrainer, TrainerBase, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage

from ..config.load import load_config
from ..data.mapper import jitter_and_crop_augmentations
from ..engine.optimizer import build_optimizer
from ..engine.trainer import Trainer
from .measure import Case, Contender, Run, Settings

_NEVER = 10**9


def _trainer_cases(settings: Settings) -> list[Case]:
    """Return one case: steps of training on the digits, from reading images to all hooks."""
    contenders = {"detectron2's trainer": _plain, "this project's trainer": _guarded}
    return [
        Case(
            "trainer",
            "trainer",
            "training on digits with all hooks, 8x3x128x128",
            tuple(Contender(name, partial(run, settings)) for name, run in contenders.items()),
            waits=True,
        )
    ]


def _config(settings: Settings, folder: str) -> CfgNode:
    opts = {
        "MODEL.DEVICE": settings.device,
        "MODEL.EMA.DECAY": 0.999,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.MAX_ITER": _NEVER,
        "SOLVER.CHECKPOINT_PERIOD": _NEVER,
        "TEST.EVAL_PERIOD": 0,
        "SEED": 0,
        "OUTPUT_DIR": folder,
    }
    config = settings.configs / "Digits" / "retinanet_SASA.yaml"
    return load_config(str(config), [str(part) for pair in opts.items() for part in pair])


def _plain(settings: Settings) -> Run:
    cfg = _config(settings, tempfile.gettempdir())
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    mapper = DatasetMapper(
        cfg, is_train=True, augmentations=jitter_and_crop_augmentations(cfg, is_train=True)
    )
    loader = build_detection_train_loader(cfg, mapper=mapper)
    trainer = SimpleTrainer(model, loader, optimizer)
    scheduler = build_lr_scheduler(cfg, optimizer)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(optimizer, scheduler)])
    return _steps(trainer)


def _guarded(settings: Settings) -> Run:
    folder = tempfile.TemporaryDirectory(prefix="benchmark-")
    return _steps(Trainer(_config(settings, folder.name)), folder)


def _steps(trainer: TrainerBase, *kept: object) -> Run:
    """Return a call that does one iteration of a trainer's loop; it keeps what that needs."""
    trainer.iter = trainer.start_iter = 0
    trainer.max_iter = _NEVER
    trainer.storage = EventStorage()
    with trainer.storage:
        trainer.before_train()

    def step() -> None:
        with trainer.storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1

    step.kept = kept

    return step


CASES = {"trainer": _trainer_cases}
