"""What a Trainer of detectron2 needs to train with a recipe of this project.

Each method of a DefaultTrainer that is replaced calls one function of this module; docs/training.md
has such a trainer.

Keys that name something which only the trainer of this project has, such as ``MODEL.EMA.DECAY`` and
``SOLVER.ACCUMULATION_STEPS``, are named in a warning when the training begins.
"""

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from ..config.options import EPOCHS, RunOptions
from ..data.mapper import build_test_mapper, build_train_mapper
from .optimizer import build_optimizer
from .schedule import build_lr_scheduler, in_iterations, scale_learning_rate
from .tasks import task_of

__all__ = [
    "build_evaluator",
    "build_lr_scheduler",
    "build_optimizer",
    "build_test_mapper",
    "build_train_mapper",
    "in_detectron2_keys",
]


def in_detectron2_keys(cfg: CfgNode) -> CfgNode:
    """Return a config whose length and learning rate are in keys that detectron2 reads.

    Lengths in epochs become iterations, for which the training data are loaded, and
    ``SOLVER.BASE_LR`` is scaled from ``REFERENCE_BATCH`` to ``IMS_PER_BATCH``.

    Args:
        cfg: a config with sasa_det's keys, which stays as it is.

    Raises:
        DatasetError: if no image to train on has the annotations that the config asks for.
    """
    options = scale_learning_rate(RunOptions.read(cfg)).replace(reference_batch=0)
    if any(getattr(options, in_epochs) for in_epochs in EPOCHS):
        options = in_iterations(options, task_of(options).train_loader().num_images)
    return options.config


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a data set, as :class:`sasa_det.engine.Trainer` does.

    Args:
        cfg: a config with sasa_det's keys.
        dataset_name: a registered data set.
        output_folder: of the results; a folder of ``OUTPUT_DIR`` by default.
    """
    task = task_of(RunOptions.read(cfg))
    return task.evaluator(dataset_name, output_folder or task.results_folder(dataset_name))
