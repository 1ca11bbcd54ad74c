"""Which parameter learns at which rate, and decays by how much."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from sasa_det import add_sasa_config
from sasa_det.engine.optimizer import build_optimizer, parameter_groups
from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.modeling import Classifier


def model():
    return nn.ModuleDict(
        {
            "stem": AttentionStem(3, 8, 2),
            "attention": LocalSelfAttention2d(8, 8, 3, 2),
            "norm": nn.BatchNorm2d(8),
            "conv": nn.Conv2d(8, 4, 1),
        }
    )


class Classified(Classifier):
    """The linear layer of a classifier without its backbone."""

    def __init__(self):
        nn.Module.__init__(self)
        self.linear = nn.Linear(4, 3)


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


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize(("decay", "warmup"), [(2.0, 0), (None, 30), (0.0, 30)])
def test_decay_and_warmup_of_queries_and_keys_alone(name, factor, decay, warmup):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.WEIGHT_DECAY = 0.25
    cfg.SOLVER.LOGIT_LR_FACTOR = factor
    cfg.SOLVER.WEIGHT_DECAY_LOGIT = decay
    cfg.SOLVER.LOGIT_WARMUP_ITERS = warmup
    net = nn.ModuleDict({**model(), "linear": Classified()})
    optimizer = build_optimizer(cfg, net)
    warmups = {
        id(p): group.get("warmup_iters", 0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    actual = settings(optimizer, net.named_parameters())
    assert len(actual) == len(list(net.parameters()))
    for parameter, tensor in net.named_parameters():
        is_projection = "query.weight" in parameter or "key.weight" in parameter
        # The linear layer of a classifier has the factor alone.
        lr = 0.5 * factor if is_projection or "linear" in parameter else 0.5
        expected = 0.0 if "norm" in parameter or "rel_" in parameter else 0.25
        expected = 0.0 if "embedding" in parameter else expected
        if is_projection and decay is not None:
            expected = decay
        assert actual[parameter] == (lr, expected), parameter
        assert warmups[id(tensor)] == (warmup if is_projection else 0), parameter


@pytest.mark.parametrize("qk_norm", ["BN", "RMS", "cosine"])
def test_norms_of_queries_and_keys_decay_as_norms_and_learn_at_the_full_rate(qk_norm):
    layer = LocalSelfAttention2d(8, 8, 3, 2, qk_norm=qk_norm)
    options = {"weight_decay": 0.25, "weight_decay_norm": 0.125, "weight_decay_logit": 2.0}
    groups = parameter_groups(layer, base_lr=0.5, logit_lr_factor=0.1, **options)
    actual = settings(torch.optim.SGD(groups), layer.named_parameters())
    norms = {name for name in actual if "_norm." in name}
    assert len(norms) == {"BN": 4, "RMS": 2, "cosine": 1}[qk_norm]
    assert {actual[name] for name in norms} == {(0.5, 0.125)}
    assert actual["query.weight"] == actual["key.weight"] == (0.05, 2.0)


def test_the_linear_layer_of_a_classifier_has_a_factor_of_its_own():
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.LOGIT_LR_FACTOR = 0.5, 0.1
    net = nn.ModuleDict({**model(), "linear": Classified()})
    for factor, expected in ((0.0, 0.05), (0.2, 0.1), (1.0, 0.5)):
        cfg.SOLVER.LINEAR_LR_FACTOR = factor
        actual = settings(build_optimizer(cfg, net), net.named_parameters())
        assert actual["linear.linear.weight"][0] == actual["linear.linear.bias"][0] == expected
        assert actual["attention.query.weight"][0] == actual["stem.key.weight"][0] == 0.05


def test_groups_of_an_optimizer_stay_what_checkpoints_have():
    cfg = get_cfg()
    add_sasa_config(cfg)
    optimizer = build_optimizer(cfg, model())
    assert all("warmup_iters" not in group for group in optimizer.param_groups)
    cfg.SOLVER.LOGIT_LR_FACTOR = 0.1
    assert len(build_optimizer(cfg, model()).param_groups) == len(optimizer.param_groups) + 1


def test_sgd_with_nesterov_momentum_is_nesterovs_accelerated_gradient():
    """The look-ahead of Sutskever et al. (2013), in the point that gradients are taken at."""
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV, cfg.SOLVER.BASE_LR = 0.9, True, 0.05
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    curvature = torch.tensor([[3.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    net = nn.Linear(2, 1, bias=False).double()
    optimizer = build_optimizer(cfg, net)
    theta, velocity = net.weight.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(12):
        optimizer.zero_grad()
        (0.5 * net.weight @ curvature @ net.weight.T).sum().backward()
        optimizer.step()
        ahead = theta + 0.9 * velocity
        velocity = 0.9 * velocity - 0.05 * (ahead @ curvature + 0.01 * ahead)
        theta = theta + velocity
        # PyTorch's weights are the points ahead.
        torch.testing.assert_close(net.weight.detach(), theta + 0.9 * velocity)


def test_other_optimizers_are_named():
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.SOLVER.OPTIMIZER = "Adagrad"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', got 'Adag"):
        build_optimizer(cfg, model())
