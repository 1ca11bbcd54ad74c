"""Which parameter learns at which rate, and decays by how much."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from sasa_det import add_sasa_config
from sasa_det.engine.optimizer import build_optimizer
from sasa_det.layers import AttentionStem, LocalSelfAttention2d


def model():
    return nn.ModuleDict(
        {
            "stem": AttentionStem(3, 8, 2),
            "attention": LocalSelfAttention2d(8, 8, 3, 2),
            "norm": nn.BatchNorm2d(8),
            "conv": nn.Conv2d(8, 4, 1),
        }
    )


def settings(optimizer, parameters):
    """Map every parameter's name to (lr, weight decay)."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    return {name: found[id(parameter)] for name, parameter in parameters}


@pytest.mark.parametrize("name,kind", [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
@pytest.mark.parametrize("factor,stem_factor", [(1.0, 0.0), (0.1, 0.0), (0.1, 1.0), (1.0, 0.2)])
def test_rates_and_decays(name, kind, factor, stem_factor):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.WEIGHT_DECAY = 0.25
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.125
    cfg.SOLVER.LOGIT_LR_FACTOR = factor
    cfg.SOLVER.STEM_LOGIT_LR_FACTOR = stem_factor
    net = model()
    optimizer = build_optimizer(cfg, net)
    assert isinstance(optimizer, kind)
    actual = settings(optimizer, net.named_parameters())
    for parameter, (lr, decay) in actual.items():
        expected = 1.0
        if parameter in ("attention.query.weight", "attention.key.weight"):
            expected = factor
        elif parameter in ("stem.query.weight", "stem.key.weight"):
            expected = stem_factor or factor
        assert lr == 0.5 * expected, parameter
        if "norm" in parameter:
            expected = 0.125
        elif "rel_" in parameter or "embedding" in parameter:
            expected = 0.0
        else:
            expected = 0.25
        assert decay == expected, parameter


def test_other_optimizers_are_named():
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.OPTIMIZER = "Adagrad"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got 'Adag"):
        build_optimizer(cfg, model())
