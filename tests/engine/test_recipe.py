"""The whole recipe of appendix A.2, step by step without training, held against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sasa_det.config.options import RunOptions
from sasa_det.engine import load_config
from sasa_det.engine.hooks import ModelEma
from sasa_det.engine.optimizer import build_optimizer
from sasa_det.engine.schedule import build_lr_scheduler, in_iterations, scale_learning_rate

IMAGENET = 1281167


def recipe(*opts):
    cfg = load_config("configs/ImageNet/SASA_R_50_full.yaml", [str(opt) for opt in opts])
    return in_iterations(scale_learning_rate(RunOptions.read(cfg)), IMAGENET).config


class Scalar(nn.Module):
    """A norm, whose only weight that is trained does not decay, which keeps formulas short."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, dtype=torch.double)
        self.norm.bias.requires_grad_(False)


@pytest.mark.parametrize("batch, base", [(4096, 1.6), (256, 0.1)])
def test_rates_of_the_recipe(batch, base):
    cfg = recipe("SOLVER.IMS_PER_BATCH", batch)
    total, warmup = round(130 * IMAGENET / batch), round(10 * IMAGENET / batch)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (total, warmup)
    optimizer = build_optimizer(cfg, Scalar())
    scheduler = build_lr_scheduler(cfg, optimizer)
    for step in (0, 1, warmup // 2, warmup, warmup + 1, (warmup + total) // 2, total - 1, total):
        scheduler.last_epoch = step
        if step < warmup:
            expected = base * step / warmup
        else:
            done = (step - warmup) / (total - warmup)
            expected = base * (1 + math.cos(math.pi * done)) / 2
        assert scheduler.get_lr()[0] == pytest.approx(expected, rel=1e-9, abs=1e-12), step


@pytest.mark.slow
def test_weight_momentum_and_average_of_the_whole_recipe():
    """Under gradients of 1, Nesterov's velocity is a geometric sum and the weight follows."""
    cfg = recipe()
    model = Scalar()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    ema = ModelEma(model, cfg.MODEL.EMA.DECAY)
    total = cfg.SOLVER.MAX_ITER
    assert total == 40662
    rates, weights, averages = (np.empty(total) for _ in range(3))
    model.norm.weight.grad = torch.ones(1, dtype=torch.double)
    for step in range(total):
        rates[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        ema.update()
        scheduler.step()
        weights[step] = model.norm.weight.item()
        averages[step] = ema.state_dict()["weights"]["norm.weight"].item()
    (state,) = optimizer.state.values()

    t = np.arange(total)
    warmup = cfg.SOLVER.WARMUP_ITERS
    cosine = (1 + np.cos(np.pi * (t - warmup) / (total - warmup))) / 2
    np.testing.assert_allclose(rates, 1.6 * np.where(t < warmup, t / warmup, cosine), atol=1e-9)
    velocity = (1 - 0.9 ** (t + 1)) / (1 - 0.9)
    assert state["momentum_buffer"].item() == pytest.approx(velocity[-1], rel=1e-12)
    # w_0 = 1, the weight of a norm at first.
    expected = 1 - np.cumsum(rates * (1 + 0.9 * velocity))
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    # decay^(n-1) w_1 + (1 - decay) sum_k decay^(n-k) w_k, at some n.
    decay = 0.9999
    for n in (1, 2, 100, 20000, total):
        shares = (1 - decay) * decay ** (n - 1.0 - np.arange(n))
        shares[0] = decay ** (n - 1.0)
        assert averages[n - 1] == pytest.approx((shares * weights[:n]).sum(), rel=1e-9)


def test_what_decays():
    from detectron2.modeling import build_model

    def decays(*opts):
        cfg = recipe(
            "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 26, "MODEL.SASA.WIDTH_MULTIPLIER", 0.25,
            *opts,
        )  # fmt: skip
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {
            names[p]: group["weight_decay"] for group in optimizer.param_groups
            for p in group["params"]
        }  # fmt: skip

    plain = decays()
    block = "backbone.res2.0"
    assert plain[f"{block}.conv1.weight"] == plain["backbone.linear.weight"] == 1e-4
    assert plain[f"{block}.attention.query.weight"] == 1e-4
    for name in (f"{block}.conv1.norm.weight", f"{block}.norm.bias", f"{block}.attention.rel_rows"):
        assert plain[name] == 0, name
    assert plain["backbone.stem.mixture_embedding"] == 0
    asked = decays("SOLVER.WEIGHT_DECAY_NORM", 0.5, "SOLVER.WEIGHT_DECAY_EMBEDDING", 0.25)
    assert asked[f"{block}.conv1.norm.weight"] == 0.5
    assert asked[f"{block}.attention.rel_rows"] == 0.25


def test_batch_norms_average_as_slowly_as_asked():
    from sasa_det.engine import Trainer

    cfg = recipe("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 26, "MODEL.BN_DECAY", 0.75)
    norms = [m for m in Trainer.build_model(cfg).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and {norm.momentum for norm in norms} == {0.25}
