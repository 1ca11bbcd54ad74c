"""A layer of attention as one piece: what it keeps and what it makes a part at a time."""

import pytest
import torch

import sasa_det.layers.one_piece as one_piece
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import cpu
from sasa_det.ops.product import Operand

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))


def layer_with_biases(**options):
    """Return a layer as a fused model has it, whose norm became part of the projections."""
    layer = LocalSelfAttention2d(24, 36, 5, num_heads=6, **options).requires_grad_(False)
    for projection in one_piece.projections(layer):
        projection.bias = torch.nn.Parameter(torch.randn(36), requires_grad=False)
    return layer


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"content": False}, {"position": "none", "border": "zero"}]
)
@pytest.mark.parametrize("groups", [2, 4, 6])
def test_heads_of_a_large_image_run_a_few_at_a_time_to_the_same_bits(monkeypatch, options, groups):
    layer = layer_with_biases(**options)
    assert one_piece.is_one_piece(layer)
    x = Operand(torch.randn(2, 24, 9, 20), [torch.randn(24), torch.randn(24)], relu=True)
    expected = one_piece.infer(layer, x)
    channels_at_once = []

    def products(source, weights, biases):
        assert source.data.shape[0] == 1
        channels_at_once.append(weights[0].shape[0])
        return real_products(source, weights, biases)

    real_products = one_piece.products
    monkeypatch.setattr(one_piece, "products", products)
    numbers_of_image = len(one_piece.projections(layer)) * 36 * 180
    monkeypatch.setattr(one_piece, "MOST_PROJECTED", -(-numbers_of_image // groups))
    assert torch.equal(one_piece.infer(layer, x), expected)
    # Six heads of six channels, for each of the two images.
    assert channels_at_once == {2: [18] * 2, 4: [12] * 3, 6: [6] * 6}[groups] * 2


def test_values_of_large_maps_are_not_kept(monkeypatch):
    layer = LocalSelfAttention2d(24, 24, 5, num_heads=6)
    x = torch.randn(1, 24, 9, 20, requires_grad=True)

    def gradients():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        maps = [t for t in kept if t.shape == y.shape and t is not x]
        return len(maps), torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    small, expected = gradients()
    monkeypatch.setattr(one_piece, "MOST_KEPT_VALUES", 24 * 9 * 20 - 1)
    large, actual = gradients()
    assert (small, large) == (3, 2)  # queries, keys and, of the small map, values
    assert all(map(torch.equal, actual, expected))
