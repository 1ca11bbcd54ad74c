"""Norms of queries and keys, each over the channels of one attention head."""

import math

import torch
from torch import Tensor, nn

# The logarithm of the largest length that is learned, as in Swin Transformer V2.
_LARGEST = math.log(100.0)


class HeadRMSNorm(nn.Module):
    """Divides each head of every pixel by its root mean square, and multiplies by a learned scale.

    As the norms of queries and keys of current language models and, without the mean, of "Scaling
    Vision Transformers to 22 Billion Parameters".
    """

    def __init__(self, channels: int, num_heads: int, eps: float = 1e-6):
        """
        Args:
            channels: channels of all heads together.
            num_heads: number of attention heads.
            eps: is added to the mean square.
        """
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.channel_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, channels, H, W), floating point.

        Returns:
            (N, channels, H, W), computed in float32 at least.
        """
        heads = _heads(x, self.num_heads)
        normed = heads * (heads.square().mean(2, keepdim=True) + self.eps).rsqrt()
        return (normed.flatten(1, 2) * self.channel_scale[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channel_scale.shape[0]}, num_heads={self.num_heads}, eps={self.eps}"


class HeadUnitNorm(nn.Module):
    """Gives each head of every pixel the length 1 or a learned one, the same for all pixels.

    With it on queries and keys, q.k is the scaled cosine of "Swin Transformer V2: Scaling Up
    Capacity and Resolution".
    """

    def __init__(self, num_heads: int, scaled: bool, eps: float = 1e-6):
        """
        Args:
            num_heads: number of attention heads.
            scaled: whether the length is learned, by its logarithm ``logit_scale``; it is at most
                100.
            eps: is added to the square of the length to divide by.
        """
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.largest = _LARGEST
        scale = nn.Parameter(torch.zeros(num_heads)) if scaled else None
        self.register_parameter("logit_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, channels, H, W), floating point.

        Returns:
            (N, channels, H, W), computed in float32 at least.
        """
        heads = _heads(x, self.num_heads)
        factor = (heads.square().sum(2, keepdim=True) + self.eps).rsqrt()
        if self.logit_scale is not None:
            length = self.logit_scale.clamp(max=self.largest).exp()
            factor = factor * length[:, None, None, None]
        return (heads * factor).flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scaled={self.logit_scale is not None}, eps={self.eps}"


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return (N, num_heads, head width, H, W) in the type that norms compute in."""
    if x.dtype != torch.float64:
        x = x.float()
    # Not unflatten, which ONNX has since opset 13 alone.
    return x.reshape(x.shape[0], num_heads, x.shape[1] // num_heads, x.shape[2], x.shape[3])
