"""Lengths in epochs and rates of a batch, in closed form."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage
from torch import nn

from sasa_det import add_sasa_config
from sasa_det.config.options import RunOptions
from sasa_det.config.values import check_schedule
from sasa_det.engine import UsageError, load_config, schedule
from sasa_det.engine.optimizer import build_optimizer
from sasa_det.engine.schedule import LearningRate, build_lr_scheduler
from sasa_det.layers import LocalSelfAttention2d


def in_iterations(cfg, num_images):
    return schedule.in_iterations(RunOptions.read(cfg), num_images).config


def scale_learning_rate(cfg):
    return schedule.scale_learning_rate(RunOptions.read(cfg)).config


def config(**values):
    cfg = get_cfg()
    add_sasa_config(cfg)
    for key, value in values.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_epochs_become_iterations():
    cfg = config(
        SOLVER__IMS_PER_BATCH=64,
        SOLVER__MAX_EPOCHS=150.0,
        SOLVER__WARMUP_EPOCHS=1.0,
        SOLVER__CHECKPOINT_EPOCHS=0.0,
        SOLVER__STEP_EPOCHS=(60.0, 80.5),
        SOLVER__CHECKPOINT_PERIOD=77,
        TEST__EVAL_EPOCHS=1e-9,
    )
    found = in_iterations(cfg, 117266)
    assert found.SOLVER.MAX_ITER == round(150 * 117266 / 64) == 274842
    assert found.SOLVER.WARMUP_ITERS == 1832
    assert found.SOLVER.STEPS == (109937, 147499)
    assert found.SOLVER.CHECKPOINT_PERIOD == 77
    assert found.TEST.EVAL_PERIOD == 1
    assert (found.SOLVER.MAX_EPOCHS, found.SOLVER.STEP_EPOCHS) == (0.0, ())
    assert cfg.SOLVER.MAX_ITER == get_cfg().SOLVER.MAX_ITER


@pytest.mark.parametrize(
    "reference, batch, expected", [(64, 16, 0.03), (64, 64, 0.12), (0, 16, 0.12)]
)
def test_rate_follows_the_batch(reference, batch, expected):
    cfg = config(
        SOLVER__BASE_LR=0.12, SOLVER__IMS_PER_BATCH=batch, SOLVER__REFERENCE_BATCH=reference
    )
    assert scale_learning_rate(cfg).SOLVER.BASE_LR == pytest.approx(expected, rel=1e-12)


class Clock:
    def __init__(self):
        self.storage = EventStorage()


def rates(cfg, start, stop):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight]}, {"params": [model.bias], "lr": cfg.SOLVER.BASE_LR * 2}],
        lr=cfg.SOLVER.BASE_LR,
    )
    hook = LearningRate(build_lr_scheduler(cfg, optimizer))
    hook.trainer = Clock()
    hook.start_at(start)
    found = []
    for _ in range(start, stop):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        hook.after_step()
    return found


def test_resumed_rates_are_the_closed_form_and_bit_equal():
    cfg = config(
        SOLVER__BASE_LR=0.12,
        SOLVER__MAX_ITER=100,
        SOLVER__WARMUP_ITERS=10,
        SOLVER__WARMUP_FACTOR=0.0,
        SOLVER__LR_SCHEDULER_NAME="WarmupCosineLR",
    )
    unbroken = rates(cfg, 0, 100)
    warm = 0.12 * (1 + math.cos(math.pi * 0.1)) / 2
    for iteration, (rate, double) in enumerate(unbroken):
        if iteration < 10:
            expected = warm * iteration / 10
        else:
            expected = 0.12 * (1 + math.cos(math.pi * iteration / 100)) / 2
        assert rate == pytest.approx(expected, abs=1e-12)
        assert double == pytest.approx(2 * expected, abs=1e-12)
    assert rates(cfg, 37, 100) == unbroken[37:]


@pytest.mark.parametrize("name", ["WarmupThenCosineLR", "WarmupCosineLR", "WarmupMultiStepLR"])
def test_a_warmup_of_queries_and_keys_multiplies_the_rate_of_any_schedule(name):
    cfg = config(
        SOLVER__BASE_LR=0.5,
        SOLVER__MAX_ITER=60,
        SOLVER__WARMUP_ITERS=10,
        SOLVER__STEPS=(20, 50),
        SOLVER__LR_SCHEDULER_NAME=name,
        SOLVER__LOGIT_WARMUP_ITERS=30,
        SOLVER__LOGIT_LR_FACTOR=0.5,
    )

    def rates_by_warmup(start, stop):
        layer = LocalSelfAttention2d(4, 4, 3, 2)
        optimizer = build_optimizer(cfg, layer)
        hook = LearningRate(build_lr_scheduler(cfg, optimizer))
        hook.trainer = Clock()
        hook.start_at(start)
        # As a checkpoint does that has another warmup.
        for group in optimizer.param_groups:
            group["warmup_iters"] = 7
        rate = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        found = []
        for _ in range(start, stop):
            found.append([rate[id(p.weight)]["lr"] for p in (layer.query, layer.key, layer.value)])
            optimizer.step()
            hook.after_step()
        return found

    unbroken = rates_by_warmup(0, 60)
    for iteration, (query, key, value) in enumerate(unbroken):
        assert query == key
        assert query == pytest.approx(0.5 * value * min(1, iteration / 30), rel=1e-12)
    assert unbroken[0][0] == 0 < unbroken[0][2] and unbroken[29][0] < 0.5 * unbroken[29][2]
    assert rates_by_warmup(17, 60) == unbroken[17:]


def test_a_warmup_of_queries_and_keys_is_shorter_than_the_run():
    cfg = config(SOLVER__MAX_ITER=60, SOLVER__STEPS=(), SOLVER__WARMUP_ITERS=0)
    cfg.SOLVER.LOGIT_WARMUP_ITERS = 59
    check_schedule(RunOptions.read(cfg))
    cfg.SOLVER.LOGIT_WARMUP_ITERS = 60
    with pytest.raises(
        UsageError,
        match="SOLVER.LOGIT_WARMUP_ITERS must be below SOLVER.MAX_ITER, which is 60, got 60",
    ):
        check_schedule(RunOptions.read(cfg))
    cfg.SOLVER.MAX_EPOCHS = 2.0  # whose iterations the data set gives
    check_schedule(RunOptions.read(cfg))


@pytest.mark.parametrize("name", ["WarmupThenCosineLR", "WarmupCosineLR", "WarmupMultiStepLR"])
def test_warmup_starts_at_its_factor(name):
    cfg = config(
        SOLVER__BASE_LR=0.5,
        SOLVER__MAX_ITER=100,
        SOLVER__WARMUP_ITERS=10,
        SOLVER__WARMUP_FACTOR=0.2,
        SOLVER__STEPS=(50,),
        SOLVER__LR_SCHEDULER_NAME=name,
    )
    (first, _), (second, _) = rates(cfg, 0, 2)
    # detectron2's cosine has begun to fall by the end of the warmup.
    end = (1 + math.cos(math.pi * 0.1)) / 2 if name == "WarmupCosineLR" else 1.0
    assert first == pytest.approx(0.5 * 0.2, rel=1e-12)
    assert second == pytest.approx(0.5 * (0.2 + (end - 0.2) / 10), rel=1e-12)


def test_the_last_word_on_a_length_counts():
    coco = "configs/COCO-Detection/retinanet_SASA_R_50_full.yaml"
    given = load_config(coco)
    cfg = in_iterations(given, 117266)
    # The file says the same for trainers that know no epochs.
    for solver in (given.SOLVER, cfg.SOLVER):
        assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (274842, 1832)
        assert solver.CHECKPOINT_PERIOD == 9161
    assert given.TEST.EVAL_PERIOD == cfg.TEST.EVAL_PERIOD == 18323
    assert in_iterations(given, 64000).SOLVER.MAX_ITER == 150000
    cfg = in_iterations(load_config(coco, ["SOLVER.MAX_ITER", "90"]), 117266)
    assert cfg.SOLVER.MAX_ITER == 90 and cfg.SOLVER.WARMUP_ITERS == 1832
    # A child that counts in iterations does not have its parent's epochs.
    cfg = in_iterations(load_config("configs/Digits/retinanet_conv.yaml"), 117266)
    assert cfg.SOLVER.MAX_ITER == 800 and cfg.SOLVER.WARMUP_ITERS == 100
    assert scale_learning_rate(cfg).SOLVER.BASE_LR == cfg.SOLVER.BASE_LR == 0.006
    # A rate is that of the batch it is given for.
    batch = ["SOLVER.IMS_PER_BATCH", "16"]
    assert scale_learning_rate(load_config(coco, batch)).SOLVER.BASE_LR == 0.03
    cfg = load_config(coco, [*batch, "SOLVER.BASE_LR", "0.01"])
    assert scale_learning_rate(cfg).SOLVER.BASE_LR == 0.01
