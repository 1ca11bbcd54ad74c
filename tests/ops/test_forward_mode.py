"""Forward-mode gradients are right, or refused; none is lost without a word."""

import pytest
import torch
from torch.autograd import forward_ad

from sasa_det.layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from sasa_det.layers.joined import is_joined
from sasa_det.ops import cuda, local_attention, vector_aggregation, window_product
from sasa_det.ops.exporting import why_not_instead

LAYERS = {
    "local": lambda: LocalSelfAttention2d(4, 8, kernel_size=3, num_heads=2),
    "pairwise": lambda: PairwiseAttention2d(4, 16, 3, relation_channels=3),
    "patchwise": lambda: PatchwiseAttention2d(4, 16, 3, relation_channels=3),
    "patchwise, star": lambda: PatchwiseAttention2d(4, 16, 3, "star_product", 3),
    "stem": lambda: AttentionStem(4, 8, num_heads=2),
}


def tangents(function, x, tangent):
    """Return what both interfaces of PyTorch find, and a difference quotient."""
    step = 1e-6
    with torch.no_grad():
        quotient = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    return found, torch.func.jvp(function, (x,), (tangent,))[1], quotient


def check(function, *size):
    torch.manual_seed(0)
    x, tangent = torch.randn(2, *size, dtype=torch.float64).split(1)
    found, of_func, quotient = tangents(function, x, tangent)
    assert quotient.abs().max() > 1e-3
    torch.testing.assert_close(found, quotient, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_func, quotient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    check(LAYERS[name]().double().eval(), 4, 8, 8)


def test_operators():
    torch.manual_seed(0)
    weight = torch.randn(1, 2, 9, 5, 6, dtype=torch.float64)
    check(lambda x: vector_aggregation(weight, x, 3), 4, 5, 6)
    check(lambda x: local_attention(x, x, x, None, None, kernel_size=3, num_heads=2), 4, 5, 6)


@pytest.mark.parametrize("name", LAYERS)
def test_where_kernels_would_run(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    x, tangent = torch.randn(2, 4, 8, 8).split(1)
    actual = torch.func.jvp(layer, (x,), (tangent,))[1]
    expected = torch.func.jvp(layer.double(), (x.double(),), (tangent.double(),))[1]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_what_has_none_says_so():
    x = torch.randn(1, 4, 5, 6)
    with pytest.raises(NotImplementedError, match="window_product has no forward-mode gradients"):
        torch.func.jvp(lambda x: window_product(x, x, 3), (x,), (x,))
    options = {"kernel_size": 3, "num_heads": 2, "backend": "loop"}
    with pytest.raises(RuntimeError, match="'loop' has no forward-mode gradients; 'reference'"):
        torch.func.jvp(lambda x: local_attention(x, x, x, None, None, **options), (x,), (x,))


def test_kernels_of_gpus_do_not_take_part(monkeypatch):
    monkeypatch.setattr(cuda, "why_not_like", lambda *arguments, **options: None)
    layer, x = LAYERS["local"](), torch.randn(1, 4, 5, 6)
    assert is_joined(layer, x) and why_not_instead(x) is None
    with forward_ad.dual_level():
        assert not is_joined(layer, x) and why_not_instead(x) is not None
