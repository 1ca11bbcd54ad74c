"""The moving average of weights against its closed form."""

import pytest
import torch
from torch import nn

from sasa_det.engine.hooks import ModelEma


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    model[0].bias.requires_grad_(False)
    return model


def advance(model, number):
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_average_is_the_closed_form():
    model = build()
    ema = ModelEma(model, 0.9)
    history = []
    for number in range(1, 6):
        advance(model, number)
        ema.update()
        history.append(model[0].weight.detach().clone())
    expected = 0.9**4 * history[0]
    for age, weight in enumerate(reversed(history[1:])):
        expected = expected + 0.1 * 0.9**age * weight
    averages = ema.state_dict()["weights"]
    assert set(averages) == {"0.weight", "1.weight", "1.bias"}
    torch.testing.assert_close(averages["0.weight"], expected, rtol=1e-12, atol=1e-12)


def test_weights_come_back_whatever_happens():
    model = build()
    ema = ModelEma(model, 0.5)
    for number in range(3):
        advance(model, number)
        ema.update()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = ema.state_dict()["weights"]["0.weight"].clone()
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert torch.equal(model[0].weight, average)
        assert torch.equal(model[0].bias, before["0.bias"])
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(ema.state_dict()["weights"]["0.weight"], average)
    # The parameters are those that the optimizer knows, and go on being averaged.
    advance(model, 9)
    ema.update()
    expected = average * 0.5 + model[0].weight.detach() * 0.5
    torch.testing.assert_close(ema.state_dict()["weights"]["0.weight"], expected)


def test_a_loaded_average_goes_on_as_the_one_that_was_saved():
    model = build()
    ema = ModelEma(model, 0.9)
    advance(model, 1)
    ema.update()
    other_model = build()
    other_model.load_state_dict(model.state_dict())
    other = ModelEma(other_model, 0.9)
    other.load_state_dict(ema.state_dict())
    for one, average in ((model, ema), (other_model, other)):
        advance(one, 2)
        average.update()
    for name, value in ema.state_dict()["weights"].items():
        assert torch.equal(other.state_dict()["weights"][name], value)
    state = ema.state_dict()
    del state["weights"]["1.bias"]
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(state)
