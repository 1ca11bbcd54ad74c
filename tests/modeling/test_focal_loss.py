"""The focal loss, against fvcore's and against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss

from sasa_det.modeling import focal_loss as module
from sasa_det.modeling.focal_loss import focal_loss

CLASSES = 5


def levels(dtype=torch.float64, sizes=(6, 1, 3), images=2):
    torch.manual_seed(0)
    logits = [torch.randn(images, size, CLASSES, dtype=dtype) * 3 for size in sizes]
    labels = torch.arange(images * sum(sizes)).view(images, -1) % (CLASSES + 2) - 1
    return [x.requires_grad_() for x in logits], labels


@pytest.mark.parametrize("alpha", [0.25, -1.0, 0.0])
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_equals_that_of_one_hot_classes(monkeypatch, alpha, gamma):
    monkeypatch.setitem(module._BLOCK, "cpu", 2 * CLASSES)
    logits, labels = levels()
    loss = focal_loss(logits, labels, alpha, gamma)
    counted = labels >= 0
    targets = F.one_hot(labels[counted], CLASSES + 1)[:, :-1].double()
    flat = torch.cat([x.detach() for x in logits], 1)[counted].requires_grad_()
    # fvcore's computes in float32.
    expected = sigmoid_focal_loss(flat, targets, alpha, gamma, "sum")
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(expected, flat)
    slopes = torch.cat(torch.autograd.grad(loss, logits), 1)
    torch.testing.assert_close(slopes[counted], slope, rtol=1e-5, atol=1e-6)
    assert (slopes[~counted] == 0).all()


def test_gradient():
    logits, labels = levels()
    assert torch.autograd.gradcheck(lambda *x: focal_loss(x, labels, 0.25, 2.0), logits)


def test_one_anchor_by_the_formula():
    logits = torch.tensor([[[0.7, -1.2]]], dtype=torch.float64)
    p, q = 1 / (1 + math.exp(-0.7)), 1 / (1 + math.exp(1.2))
    expected = -0.25 * (1 - p) ** 2 * math.log(p) - 0.75 * q**2 * math.log(1 - q)
    loss = focal_loss([logits], torch.tensor([[0]]), 0.25, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_extreme_logits_and_half_precision():
    logits = torch.tensor([[[-200.0, 200.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    loss = focal_loss([logits], torch.tensor([[0]]), 0.25, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25 * 200 + 0.75 * 200 + 0.75 * math.log(2) / 4)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    # d/dx of -p^2 log(1 - p) is p^2 (2 (1 - p) log(1 / (1 - p)) + p).
    last = 0.75 * 0.25 * (math.log(2) + 0.5)
    expected = torch.tensor([[[-0.25, 0.75, last]]], dtype=torch.bfloat16)
    torch.testing.assert_close(logits.grad, expected)


def test_twice_backward_gives_twice_the_gradient():
    logits, labels = levels()
    loss = focal_loss(logits, labels, 0.25, 2.0)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in logits]
    loss.backward()
    for x, gradient in zip(logits, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient)


def test_only_the_gradient_is_kept():
    """One tensor as large as the logits, where a formula of single operations keeps eight."""
    logits, labels = levels()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        focal_loss(logits, labels, 0.25, 2.0)
    assert [x.shape for x in kept] == [x.shape for x in logits]
