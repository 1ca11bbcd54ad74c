"""The attention layer: its parameters, its position encodings, its sizes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.position import sinusoidal_encoding
from sasa_det.ops import local_attention


def test_parameters_have_their_public_names_and_shapes():
    layer = LocalSelfAttention2d(12, 16, kernel_size=5, num_heads=4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "query.weight": (16, 12, 1, 1),
        "key.weight": (16, 12, 1, 1),
        "value.weight": (16, 12, 1, 1),
        "rel_rows": (4, 2, 5),
        "rel_cols": (4, 2, 5),
    }
    names = [n for n, _ in LocalSelfAttention2d(12, 16, 5, 4, content=False).named_parameters()]
    assert names == ["rel_rows", "rel_cols", "query.weight", "value.weight"]


def test_values_start_with_the_variance_of_their_input():
    torch.manual_seed(0)
    weight = LocalSelfAttention2d(400, 64, num_heads=4).value.weight
    # The standard deviation of so many is known to 1%.
    assert weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * 400**-0.5


def test_is_the_operation_on_projections_followed_by_a_pool():
    layer = LocalSelfAttention2d(6, 8, kernel_size=3, num_heads=2, stride=2).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    q, k, v = (
        torch.einsum("oi,nihw->nohw", p.weight[:, :, 0, 0], x)
        for p in (layer.query, layer.key, layer.value)
    )
    y = local_attention(
        q, k, v, layer.rel_rows, layer.rel_cols, kernel_size=3, num_heads=2, backend="reference"
    )
    output = layer(x)
    assert output.shape == (2, 8, 3, 4)
    torch.testing.assert_close(output[:, :, 0, 0], y[:, :, :2, :2].mean((2, 3)))
    torch.testing.assert_close(output[:, :, 2, 3], y[:, :, 4, 6])
    torch.testing.assert_close(output[:, :, 2, 0], y[:, :, 4, :2].mean(2))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 3), (7, 8), (15, 9)])
def test_a_stride_of_two_gives_the_size_of_a_strided_pointwise_convolution(size):
    x = torch.randn(1, 4, *size)
    expected = torch.nn.Conv2d(4, 8, 1, stride=2)(x).shape
    assert LocalSelfAttention2d(4, 8, 3, 2, stride=2)(x).shape == expected


def test_sinusoidal_encoding_has_its_closed_form():
    encoding = sinusoidal_encoding(8, 5, 6, dtype=torch.float64, device=torch.device("cpu"))
    for row in range(5):
        for col in range(6):
            expected = []
            for place in (row, col):
                angles = [place, place / 100]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(
                encoding[:, row, col],
                torch.tensor(expected, dtype=torch.float64),
                rtol=1e-5,
                atol=1e-5,
            )


def test_absolute_positions_enter_queries_and_keys():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 8, 3, 2, position="absolute")
    x = torch.randn(1, 8, 5, 6)
    placed = x + sinusoidal_encoding(8, 5, 6, dtype=x.dtype, device=x.device)
    expected = local_attention(
        layer.query(placed), layer.key(placed), layer.value(x), None, None,
        kernel_size=3, num_heads=2,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected)
    layer.position = "none"
    assert not torch.allclose(layer(x), expected, atol=1e-3)


def test_compiles_without_a_graph_break():
    layer = LocalSelfAttention2d(8, 8, 3, 2)
    x = torch.randn(1, 8, 5, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_heads_start_by_looking_at_their_own_neighbour():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(64, 64, 7, 8)
    x = torch.randn(1, 64, 15, 15).relu()
    # Identity-like values: output channel 0 of every head copies a ramp of rows and of columns.
    rows, cols = torch.meshgrid(torch.arange(15.0), torch.arange(15.0), indexing="ij")
    value = torch.zeros(1, 64, 15, 15)
    value[0, 0::8], value[0, 1::8] = rows, cols
    with torch.no_grad():
        y = local_attention(
            layer.query(x), layer.key(x), value, layer.rel_rows, layer.rel_cols,
            kernel_size=7, num_heads=8,
        )  # fmt: skip
    moved = torch.stack([y[0, 0::8] - rows, y[0, 1::8] - cols], 1)[:, :, 3:12, 3:12]
    looks = [(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (1, 0), (0, -1)]
    for mean, look in zip(moved.mean((2, 3)), looks, strict=True):
        torch.testing.assert_close(mean, torch.tensor(look).float(), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kernel_size": 6}, "kernel_size must be odd and at least 1, got 6"),
        ({"num_heads": 3}, "out_channels 8 must be a multiple of num_heads 3"),
        ({"position": "rotary"}, "position must be one of .*, got 'rotary'"),
        ({"border": "wrap"}, "border must be one of .*, got 'wrap'"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"content": False, "position": "none"}, "content=False .* needs position 'relative'"),
        ({"in_channels": 6, "position": "absolute"}, "in_channels must be a multiple of 4"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocalSelfAttention2d(**{"in_channels": 8, "out_channels": 8, "num_heads": 2, **options})


def shared_and_zero_padded(x, query, key, value, rows, cols, heads):
    """Attend pixel by pixel of a padded image, with one embedding for all heads; pool by halves."""
    reach = rows.shape[1] // 2
    window = 2 * reach + 1
    q, k, v = (F.conv2d(x, weight) for weight in (query, key, value))
    k, v = (F.pad(y, [reach] * 4) for y in (k, v))
    output = torch.empty_like(q)
    for n, i, j in itertools.product(range(len(x)), range(x.shape[2]), range(x.shape[3])):
        here = (slice(i, i + window), slice(j, j + window))
        for channels in torch.arange(q.shape[1]).chunk(heads):
            own = q[n, channels, i, j]
            by_row, by_col = (half @ r for half, r in zip(own.chunk(2), (rows, cols), strict=True))
            logits = (own[:, None, None] * k[n, channels][(slice(None), *here)]).sum(0)
            weights = (logits + by_row[:, None] + by_col).flatten().softmax(0)
            output[n, channels, i, j] = v[n, channels][(slice(None), *here)].flatten(1) @ weights
    return F.avg_pool2d(output, 2)


def test_an_embedding_shared_by_heads_and_zeros_around_the_image():
    """As docs/pretraining.md has it of other implementations."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 8, kernel_size=5, num_heads=2, border="zero", stride=2)
    rows, cols = torch.randn(2, 2, 5)
    weights = [layer.query.weight, layer.key.weight, layer.value.weight]
    with torch.no_grad():
        layer.rel_rows.copy_(rows.expand_as(layer.rel_rows))
        layer.rel_cols.copy_(cols.expand_as(layer.rel_cols))
        even, odd = torch.randn(2, 8, 6, 8), torch.randn(1, 8, 5, 7)
        expected = shared_and_zero_padded(even, *weights, rows, cols, 2)
        torch.testing.assert_close(layer(even), expected, rtol=0, atol=1e-5)
        # Of odd sizes the last row and column are left out there.
        expected = shared_and_zero_padded(odd, *weights, rows, cols, 2)
        assert layer(odd).shape[2:] == (3, 4) and expected.shape[2:] == (2, 3)
        torch.testing.assert_close(layer(odd)[:, :, :2, :3], expected, rtol=0, atol=1e-5)
