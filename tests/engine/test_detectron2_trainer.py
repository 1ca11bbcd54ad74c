"""Trainings of our models by detectron2's own DefaultTrainer."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

from sasa_det.config import read_keys
from sasa_det.config.load import load_config
from sasa_det.config.recipe import recipe_keys
from sasa_det.engine import recipe

CONFIG = "configs/Quick/retinanet_SASA.yaml"


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A small config with a recipe of this project, in a process where nothing was read yet."""
    monkeypatch.setattr(read_keys, "_read", set())
    options = "MODEL.DEVICE cpu SOLVER.MAX_EPOCHS 0.0 SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 "
    options += "SOLVER.OPTIMIZER AdamW DATALOADER.NUM_WORKERS 0 INPUT.JITTER.ENABLED True "
    options += "INPUT.JITTER.CROP_SIZE 96 MODEL.EMA.DECAY 0.5 DATASETS.TEST ()"
    return load_config(CONFIG, [*options.split(), "OUTPUT_DIR", str(tmp_path)])


@pytest.fixture
def recipe_trainer():
    """The trainer of the documentation."""
    text = Path("docs/training.md").read_text().partition("## With detectron2's trainer")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.rpartition("\n\n")[0], names)  # without the line that builds it
    return names["MyTrainer"]


def sizes_of(trainer):
    batch = next(iter(trainer.data_loader))
    return {tuple(record["image"].shape[1:]) for record in batch}


def test_what_is_lost_is_named_once(cfg, caplog):
    with caplog.at_level(logging.WARNING, "sasa_det"):
        trainer = DefaultTrainer(cfg)
        trainer.model.train()
    (warning,) = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    for key in ("INPUT.JITTER.ENABLED", "SOLVER.OPTIMIZER", "MODEL.EMA.DECAY"):
        assert key in warning
    assert "MODEL.SASA" not in warning
    assert type(trainer.optimizer) is torch.optim.SGD and sizes_of(trainer) != {(96, 96)}


def test_one_line_each_reads_the_recipe(cfg, recipe_trainer, caplog):
    with caplog.at_level(logging.WARNING, "sasa_det"):
        trainer = recipe_trainer(recipe.in_detectron2_keys(cfg))
    (warning,) = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    assert warning.startswith("The config sets MODEL.EMA.DECAY, which")
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    trainer.train()
    assert trainer.iter == 2
    # Not before: release 0.6 cannot iterate over its loader twice.
    assert sizes_of(recipe_trainer(recipe.in_detectron2_keys(cfg))) == {(96, 96)}
    assert isinstance(trainer.build_evaluator(cfg, "digits_val"), COCOEvaluator)


def test_lengths_in_epochs_and_the_rate_of_the_batch_in_keys_of_detectron2(cfg):
    options = ["SOLVER.MAX_EPOCHS", 2.0, "SOLVER.WARMUP_EPOCHS", 0.5]
    options += ["SOLVER.REFERENCE_BATCH", 8, "SOLVER.BASE_LR", 0.04]
    cfg.merge_from_list(options)
    found = recipe.in_detectron2_keys(cfg)
    num_images = recipe.task_of(recipe.RunOptions.read(cfg)).train_loader().num_images
    assert found.SOLVER.MAX_ITER == num_images  # two epochs of batches of two
    assert found.SOLVER.WARMUP_ITERS == round(num_images / 4)
    assert found.SOLVER.BASE_LR == pytest.approx(0.01)
    assert not {"SOLVER.MAX_EPOCHS", "SOLVER.REFERENCE_BATCH"} & set(recipe_keys(found))
    assert cfg.SOLVER.MAX_EPOCHS == 2.0  # the given config stays as it is
    assert recipe.in_detectron2_keys(found).SOLVER.BASE_LR == found.SOLVER.BASE_LR


def test_a_config_without_a_recipe_has_no_such_keys(cfg):
    cfg.merge_from_list(
        ["SOLVER.OPTIMIZER", "SGD", "INPUT.JITTER.ENABLED", False, "MODEL.EMA.DECAY", 0.0]
    )
    kept = [key for key in recipe_keys(cfg) if key.split(".")[1] in ("OPTIMIZER", "JITTER", "EMA")]
    assert not kept
