"""Other people's local attention, for comparison."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, rel_rows: Tensor, rel_cols: Tensor, kernel_size: int
) -> Callable[[], Tensor]:
    """Return a call of torch's FlexAttention, compiled, with the window and the bias of equation 3.

    Args:
        query, key, value: (N, C, H, W).
        rel_rows, rel_cols: (num_heads, C / num_heads / 2, kernel_size).
        kernel_size: extent of the window.

    Returns:
        callable: it returns (N, num_heads, H W, C / num_heads).
    """
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    n, channels, height, width = query.shape
    heads, half, _ = rel_rows.shape
    reach = kernel_size // 2

    def sequence(x: Tensor) -> Tensor:
        return x.view(n, heads, channels // heads, height * width).transpose(2, 3).contiguous()

    q, k, v = map(sequence, (query, key, value))
    row_terms = torch.einsum("nhpd,hdk->nhpk", q[..., :half].float(), rel_rows)
    col_terms = torch.einsum("nhpd,hdk->nhpk", q[..., half:].float(), rel_cols)

    def inside(b, h, p, m):
        rows, cols = m // width - p // width, m % width - p % width
        return (rows.abs() <= reach) & (cols.abs() <= reach)

    def bias(score, b, h, p, m):
        row = (m // width - p // width + reach).clamp(0, kernel_size - 1)
        col = (m % width - p % width + reach).clamp(0, kernel_size - 1)
        return score + row_terms[b, h, p, row] + col_terms[b, h, p, col]

    mask = create_block_mask(
        inside, None, None, height * width, height * width, device=query.device.type
    )
    compiled = torch.compile(attend)

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(q, k, v, score_mod=bias, block_mask=mask, scale=1.0)

    return run


def halo_attention(channels: int) -> nn.Module:
    """Return timm's HaloAttn: blocks of 8 x 8 queries that see a halo of 3 pixels around them."""
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn(channels, channels, num_heads=8, block_size=8, halo_size=3)
