"""Projections equal the convolutions they stand for."""

import pytest
import torch
from torch import nn

from sasa_det.layers.projection import project


def make(in_channels=6, widths=(4, 4, 2), dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(in_channels, width, 1, bias=False).to(dtype) for width in widths]
    return torch.randn(3, in_channels, 5, 7, dtype=dtype, requires_grad=True), layers


def test_equal_convolutions_and_their_gradients():
    x, layers = make()
    ours, theirs = project(x, layers), [layer(x) for layer in layers]
    grads = [torch.randn_like(y) for y in theirs]
    inputs = [x, *(layer.weight for layer in layers)]
    torch.testing.assert_close(list(ours), theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grads), torch.autograd.grad(theirs, inputs, grads)
    )


@pytest.mark.parametrize("frozen", ["x", "first weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, layers = make()
    (x if frozen == "x" else layers[0].weight).requires_grad_(False)
    sum(y.square().sum() for y in project(x, layers)).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (layers[0].weight.grad is None) == (frozen != "x")
    torch.testing.assert_close(
        layers[1].weight.grad, torch.autograd.grad(layers[1](x).square().sum(), layers[1].weight)[0]
    )


def test_gradients_of_gradients():
    x, layers = make(3, (2, 2))
    weights = [layer.weight for layer in layers]

    def function(x, *weights):
        for layer, weight in zip(layers, weights, strict=True):
            del layer.weight
            layer.weight = weight
        return project(x, layers)

    assert torch.autograd.gradgradcheck(function, [x[:1, :, :2, :2], *weights])


def test_hooks_of_the_layers_run():
    x, layers = make()
    layers[1].register_forward_hook(lambda layer, inputs, output: 2 * output)
    doubled = project(x, layers)[1]
    torch.testing.assert_close(doubled, 2 * torch.nn.functional.conv2d(x, layers[1].weight))


def test_autocast_decides_the_type():
    x, layers = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [y.dtype for y in project(x, layers)] == [torch.bfloat16] * 3


def test_compiles_without_a_graph_break():
    x, layers = make()
    compiled = torch.compile(lambda x: project(x, layers), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), project(x, layers))
