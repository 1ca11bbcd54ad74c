"""The weights of attention beside literal loops, and beside what the operators sum."""

import math

import pytest
import torch

from sasa_det.layers import AttentionStem
from sasa_det.ops import attention_weights, block_attention_weights, local_attention


def literal_window(query, key, rel_rows, rel_cols, kernel_size, head, border, row, column):
    """Equation 3's weights of one pixel and head, neighbour by neighbour."""
    channels, height, width = query.shape
    head_width = channels // rel_rows.shape[0]
    part = slice(head * head_width, (head + 1) * head_width)
    q = query[part, row, column].tolist()
    reach = kernel_size // 2
    terms = {}
    for i in range(kernel_size):
        for j in range(kernel_size):
            y, x = row + i - reach, column + j - reach
            inside = 0 <= y < height and 0 <= x < width
            if not inside and border == "mask":
                continue
            k = key[part, y, x].tolist() if inside else [0.0] * head_width
            r = rel_rows[head, :, i].tolist() + rel_cols[head, :, j].tolist()
            terms[i, j] = math.exp(sum(a * (b + c) for a, b, c in zip(q, k, r, strict=True)))
    total = math.fsum(terms.values())
    window = torch.zeros(kernel_size, kernel_size, dtype=torch.float64)
    for place, term in terms.items():
        window[place] = term / total
    return window


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("size", [(4, 5), (1, 2)])
def test_they_are_those_of_equation_3(border, size):
    torch.manual_seed(0)
    heads, kernel_size = 2, 5
    query, key = torch.randn(2, 1, 8, *size, dtype=torch.float64)
    rows, cols = torch.randn(2, heads, 2, kernel_size, dtype=torch.float64)
    options = {"kernel_size": kernel_size, "num_heads": heads, "border": border}
    weights = attention_weights(query, key, rows, cols, **options)
    assert weights.shape == (1, heads, kernel_size, kernel_size, *size)
    for head in range(heads):
        for row in range(size[0]):
            for column in range(size[1]):
                literal = literal_window(
                    query[0], key[0], rows, cols, kernel_size, head, border, row, column
                )
                found = weights[0, head, :, :, row, column]
                torch.testing.assert_close(found, literal, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        weights.sum((2, 3)), torch.ones(1, heads, *size, dtype=torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("content", [True, False])
def test_values_summed_with_them_are_the_output(border, content):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 8, 6, 7, dtype=torch.float64)
    rows, cols = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    options = {"kernel_size": 3, "num_heads": 2, "border": border}
    weights = attention_weights(query, key if content else None, rows, cols, **options)
    windows = torch.nn.functional.unfold(value, 3, padding=1).view(2, 2, 4, 3, 3, 6, 7)
    output = torch.einsum("nhijyx,nhdijyx->nhdyx", weights, windows).flatten(1, 2)
    expected = local_attention(
        query, key, value, rows, cols, content=content, backend="reference", **options
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
def test_those_of_blocks_make_the_output_of_the_stem(relative):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, num_heads=2, values="pointwise", relative=relative, norm=None)
    stem.double()
    image = torch.randn(1, 3, 9, 6, dtype=torch.float64)
    query, key, value = (layer(image) for layer in (stem.query, stem.key, stem.value))
    weights = block_attention_weights(
        query, key, stem.rel_rows, stem.rel_cols, block_size=4, num_heads=2
    )
    output = torch.zeros(8, 9, 6, dtype=torch.float64)
    for y in range(9):
        for x in range(6):
            seen = torch.zeros(2, dtype=torch.float64)
            for v in range(y // 4 * 4, min(y // 4 * 4 + 4, 9)):
                for u in range(x // 4 * 4, min(x // 4 * 4 + 4, 6)):
                    share = weights[0, :, v - y + 3, u - x + 3, y, x]
                    output[:, y, x] += share.repeat_interleave(4) * value[0, :, v, u]
                    seen += share
            # Nothing is left for pixels of other blocks.
            torch.testing.assert_close(seen, torch.ones_like(seen), rtol=0, atol=1e-14)
    pooled = torch.nn.functional.max_pool2d(output[None], 4, ceil_mode=True).relu()
    torch.testing.assert_close(stem(image), pooled, rtol=0, atol=1e-12)


def test_a_wrong_argument_is_named():
    query = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="border must be one of"):
        attention_weights(query, query, None, None, kernel_size=3, num_heads=2, border="wrap")
    with pytest.raises(ValueError, match="key must have query's shape"):
        attention_weights(query, query[:, :, 1:], None, None, kernel_size=3, num_heads=2)
