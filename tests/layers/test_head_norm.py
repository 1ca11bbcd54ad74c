"""Norms of queries and keys against loops over heads and pixels, with their gradients."""

import math

import pytest
import torch
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.head_norm import HeadRMSNorm, HeadUnitNorm
from sasa_det.ops import cpu

CHANNELS, HEADS = 8, 2


def vectors(x):
    """Iterate over the places and the values (head width,) of every head of every pixel."""
    width = x.shape[1] // HEADS
    for n in range(x.shape[0]):
        for head in range(HEADS):
            channels = slice(head * width, (head + 1) * width)
            for row in range(x.shape[2]):
                for col in range(x.shape[3]):
                    yield (n, channels, row, col), head, x[n, channels, row, col]


def looped_rms(norm, x):
    y = torch.zeros_like(x)
    for place, _, values in vectors(x):
        size = math.sqrt(sum(v**2 for v in values.tolist()) / len(values) + norm.eps)
        # The gradient of the size by hand: the loop is not autograd's way of dividing.
        y[place] = values / _Size.apply(values, size) * norm.channel_scale[place[1]]
    return y


class _Size(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, size):
        ctx.save_for_backward(values)
        ctx.size = size
        return values.new_tensor(size)

    @staticmethod
    def backward(ctx, grad):
        (values,) = ctx.saved_tensors
        return grad * values / (len(values) * ctx.size), None


def looped_unit(norm, x):
    y = torch.zeros_like(x)
    for place, head, values in vectors(x):
        length = 1.0 if norm.logit_scale is None else min(norm.logit_scale[head].exp(), 100.0)
        y[place] = values / (sum(v**2 for v in values) + norm.eps) ** 0.5 * length
    return y


def rms():
    norm = HeadRMSNorm(CHANNELS, HEADS).double()
    nn.init.uniform_(norm.channel_scale, 0.5, 2)
    return norm


def unit(*scales):
    norm = HeadUnitNorm(HEADS, scaled=bool(scales)).double()
    if scales:
        norm.logit_scale.data = torch.tensor(scales, dtype=torch.float64)
    return norm


@pytest.mark.parametrize(
    ("norm", "loop"),
    [(rms(), looped_rms), (unit(), looped_unit), (unit(-1.0, 2.0), looped_unit)],
    ids=["RMS", "length 1", "learned length"],
)
def test_norms_and_their_gradients_are_those_of_a_loop(norm, loop):
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 3, 2, dtype=torch.float64, requires_grad=True)
    inputs, grad = [x, *norm.parameters()], torch.randn(x.shape, dtype=torch.float64)
    found, expected = norm(x), loop(norm, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_lengths_are_at_most_100_and_zeros_stay_zeros():
    norm = unit(9.0, math.log(50.0))
    x = torch.randn(1, CHANNELS, 2, 2, dtype=torch.float64)
    x[..., 0] = 0
    for each in (norm, rms()):
        assert each(x)[..., 0].abs().max() == 0
    lengths = norm(x)[..., 1].unflatten(1, (HEADS, -1)).norm(dim=2)
    expected = torch.tensor([100.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(lengths[0, :, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [rms().float(), unit(1.0, 2.0).float()], ids=["RMS", "cosine"])
def test_half_precision_and_channels_last_change_the_input_alone(norm):
    x = torch.randn(2, CHANNELS, 5, 3)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # Computed in float32, rounded once.
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())
    last = norm(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, norm(x))
    assert last.is_contiguous(memory_format=torch.channels_last)


NORMS = ["BN", "RMS", "cosine"]


def unit_size(values):
    return values / (values.square().mean() + 1e-6).sqrt()


def looped_logits(layer, x, row, col):
    """Return the logits (num_heads, k, k) of one pixel of the first image, border masked."""
    queries, keys = (
        torch.einsum("oi,nihw->nohw", p.weight[:, :, 0, 0], x) for p in (layer.query, layer.key)
    )
    if layer.qk_norm == "BN":
        mean, var = ([t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0)] for t in (queries, keys))
        queries, keys = (
            (t - m[:, None, None]) * ((norm.weight / (v + norm.eps).sqrt())[:, None, None])
            + norm.bias[:, None, None]
            for t, norm, (m, v) in zip(
                (queries, keys), (layer.query_norm, layer.key_norm), (mean, var), strict=True
            )
        )
    width, k = layer.out_channels // layer.num_heads, layer.kernel_size
    logits = torch.full((layer.num_heads, k, k), -math.inf, dtype=x.dtype)
    for head in range(layer.num_heads):
        channels = slice(head * width, (head + 1) * width)
        query = queries[0, channels, row, col]
        temperature = 1.0
        if layer.qk_norm == "RMS":
            query = unit_size(query) * layer.query_norm.channel_scale[channels]
        elif layer.qk_norm == "cosine":
            query = query / query.norm()
            temperature = layer.key_norm.logit_scale[head].exp()
        for i in range(k):
            for j in range(k):
                r, c = row + i - k // 2, col + j - k // 2
                if not (0 <= r < x.shape[2] and 0 <= c < x.shape[3]):
                    continue
                key = keys[0, channels, r, c]
                if layer.qk_norm == "RMS":
                    key = unit_size(key) * layer.key_norm.channel_scale[channels]
                elif layer.qk_norm == "cosine":
                    key = key / key.norm()
                offset = torch.cat([layer.rel_rows[head, :, i], layer.rel_cols[head, :, j]])
                logits[head, i, j] = temperature * (query @ key) + query @ offset
    return logits / math.sqrt(width) if layer.scale_logits else logits


@pytest.mark.parametrize("scale_logits", [False, True])
@pytest.mark.parametrize("qk_norm", [None, *NORMS])
def test_a_layer_attends_by_the_logits_of_a_loop(qk_norm, scale_logits):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(6, 8, 3, 2, qk_norm=qk_norm, scale_logits=scale_logits).double()
    for norm in (layer.query_norm, layer.key_norm):
        for parameter in () if norm is None else norm.parameters():
            parameter.data += 0.3 * torch.rand_like(parameter)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    output, values = layer(x), torch.einsum("oi,nihw->nohw", layer.value.weight[:, :, 0, 0], x)
    for row, col in ((1, 2), (0, 4)):
        weights = looped_logits(layer, x, row, col).flatten(1).softmax(1).view(2, 3, 3)
        expected = torch.zeros(2, 4, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                r, c = row + i - 1, col + j - 1
                if 0 <= r < 4 and 0 <= c < 5:
                    expected += weights[:, i, j, None] * values[0, :, r, c].view(2, 4)
        torch.testing.assert_close(
            output[0, :, row, col].view(2, 4), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))
@pytest.mark.parametrize("content", [True, False])
def test_scaled_logits_in_one_piece_have_the_gradients_of_the_operator(content):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(16, 16, 3, 2, content=content, scale_logits=True)
    x = torch.randn(2, 16, 6, 7, requires_grad=True)
    inputs, grad = [x, *layer.parameters()], torch.randn(2, 16, 6, 7)
    found = torch.autograd.grad(layer(x), inputs, grad)
    layer.query.register_forward_hook(lambda *_: None)  # with which layers are called one by one
    expected = torch.autograd.grad(layer(x), inputs, grad)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        by_layers = layer(x)
        layer.query._forward_hooks.clear()
        torch.testing.assert_close(layer(x), by_layers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_logits", [False, True])
@pytest.mark.parametrize("qk_norm", NORMS)
@pytest.mark.parametrize("position", ["relative", "none"])
def test_logits_start_with_the_size_of_equation_3(position, qk_norm, scale_logits):
    x = torch.randn(4, 64, 15, 15).relu()

    @torch.no_grad()
    def sizes(**options):
        torch.manual_seed(0)
        layer = LocalSelfAttention2d(64, 64, 7, 8, position=position, **options)
        query, key, _ = (t.unflatten(1, (8, 8)) for t in layer.project(x))
        content = (query[..., 7, 7] * key[..., 7, 8]).sum(2).std()
        if position == "none":
            return [content]
        offsets = torch.einsum("nacij,ack->naijk", query[:, :, :4], layer.rel_rows)
        return [content, offsets.std(-1).mean()]

    plain = sizes()
    for found, expected in zip(
        sizes(qk_norm=qk_norm, scale_logits=scale_logits), plain, strict=True
    ):
        assert found == pytest.approx(expected.item(), rel=0.25)


@pytest.mark.parametrize("qk_norm", NORMS)
def test_layers_with_norms_are_scripted(qk_norm):
    layer = LocalSelfAttention2d(8, 8, 3, 2, qk_norm=qk_norm, scale_logits=True).eval()
    x = torch.randn(1, 8, 5, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_compiles_without_a_graph_break():
    layer = LocalSelfAttention2d(8, 8, 3, 2, qk_norm="RMS", scale_logits=True)
    x = torch.randn(1, 8, 5, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_names_in_the_state_dict_are_those_of_equation_3_unless_there_are_norms():
    plain = LocalSelfAttention2d(8, 8, 3, 2, scale_logits=True).state_dict()
    assert list(plain) == ["rel_rows", "rel_cols", "query.weight", "key.weight", "value.weight"]
    added = {
        norm: set(LocalSelfAttention2d(8, 8, 3, 2, qk_norm=norm).state_dict()) - set(plain)
        for norm in NORMS
    }
    assert added["RMS"] == {"query_norm.channel_scale", "key_norm.channel_scale"}
    assert added["cosine"] == {"key_norm.logit_scale"}
    assert {"query_norm.weight", "key_norm.running_var"} < added["BN"] and len(added["BN"]) == 10
    without = LocalSelfAttention2d(8, 8, 3, 2, content=False, qk_norm="RMS").state_dict()
    assert set(without) - set(plain) == {"query_norm.channel_scale"}


def test_other_norms_are_named():
    with pytest.raises(ValueError, match="qk_norm must be one of .*, got 'LN'"):
        LocalSelfAttention2d(8, 8, 3, 2, qk_norm="LN")
