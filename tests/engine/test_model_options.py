"""Recomputed stages and compiled parts give what the plain model gives."""

import pytest
import torch
from torch import nn

from sasa_det.engine.model_options import checkpoint_stages


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.res2 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.res3 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.res3(self.res2(x))


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom_up = Backbone()

    def forward(self, x):
        return self.bottom_up(x)


def run(model, stages):
    model = model().double()
    checkpoint_stages(model, stages)
    calls = []
    backbone = getattr(model, "bottom_up", model)
    backbone.res2[0].register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(1)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)
        model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        return {**model.state_dict(), **gradients, "input": x.grad, "test": model(x)}, len(calls)


@pytest.mark.parametrize("model", [Backbone, Pyramid])
def test_recomputed_stages_change_nothing(model):
    plain, calls = run(model, [])
    recomputed, more_calls = run(model, ["res2", "res3"])
    # Twice each in the two steps of training, once in evaluation.
    assert (calls, more_calls) == (3, 5)
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


def test_unknown_stage():
    with pytest.raises(ValueError, match="must be one of res2, res3, got res9"):
        checkpoint_stages(Backbone(), ["res9"])
