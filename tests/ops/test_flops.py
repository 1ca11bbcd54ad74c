"""FLOP counters see the attention operators and count them as the paper does."""

import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.ops.flops import fvcore_handles
from sasa_det.ops.joined_attention import attend_joined


def count(module, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "position,content,terms,projections",
    [("relative", True, 3, 3), ("relative", False, 2, 2), ("none", True, 2, 3)],
)
def test_layer(position, content, terms, projections):
    layer = LocalSelfAttention2d(12, 16, 5, 4, position=position, content=content).to("meta")
    pixels = 2 * 6 * 7
    expected = pixels * 2 * (projections * 12 * 16 + terms * 25 * 16)
    assert count(layer, torch.empty(2, 12, 6, 7, device="meta")) == expected


@pytest.mark.parametrize("content,terms", [(True, 3), (False, 2)])
def test_attention_of_one_product(content, terms):
    joined = torch.empty(2, terms * 16, 6, 7, device="meta", requires_grad=True)
    rows, cols = torch.empty(2, 4, 2, 5, device="meta")
    with FlopCounterMode(display=False) as counter:
        output, _ = attend_joined(joined, rows, cols, 5, 4, content, True)
        output.sum().backward()
    assert output.shape == (2, 16, 6, 7) and joined.grad.shape == joined.shape
    assert counter.get_total_flops() == 3 * 2 * terms * 25 * 2 * 16 * 6 * 7


@pytest.mark.parametrize(
    "values,value_macs", [("pointwise", 192), ("mixture", 4 * 192 + 4 * 64), ("convolution", 3072)]
)
def test_stem(values, value_macs):
    stem = AttentionStem(values=values).to("meta")
    expected = 224 * 224 * 2 * (2 * 192 + value_macs + 3 * 16 * 64)
    if values == "mixture":
        expected += 2 * 4 * 16 * 16  # the mixing weights themselves, once an image
    assert count(stem, torch.empty(1, 3, 224, 224, device="meta")) == expected


def test_backward_is_twice_forward():
    layer = LocalSelfAttention2d(8, 8, 3, 2).to("meta")
    x = torch.empty(1, 8, 5, 5, device="meta", requires_grad=True)
    forward = count(layer, x)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_counters_see_the_same_where_the_kernels_run():
    layer, x = LocalSelfAttention2d(8, 8, 3, 2), torch.randn(1, 8, 5, 5, requires_grad=True)
    expected = count(layer.to("meta"), x.to("meta"))
    layer = layer.to_empty(device="cpu")
    assert count(layer, x) == expected
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * expected


@pytest.mark.parametrize(
    "module,size",
    [
        (LocalSelfAttention2d(8, 8, 3, 2), (1, 8, 5, 6)),
        (AttentionStem(out_channels=16, num_heads=2, norm=None), (1, 3, 10, 9)),
    ],
)
def test_fvcore_counts_the_same(module, size):
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(module.eval(), torch.randn(size))
    analysis.set_op_handle(**fvcore_handles()).unsupported_ops_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 2 * analysis.total() == count(module, torch.randn(size))


def test_a_stem_without_embeddings_counts_two_terms():
    stem = AttentionStem(values="pointwise", relative=False).to("meta")
    expected = 16 * 16 * 2 * (3 * 192 + 2 * 16 * 64)
    assert count(stem, torch.empty(1, 3, 16, 16, device="meta")) == expected
