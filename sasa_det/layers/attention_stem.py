"""The stem that stands where a strided convolution and a max pool stood."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    block_attention,
    has_stem_kernels,
    mixed_values,
    normalized_stem_attention,
    pooled_stem_attention,
    reference,
    relative_embedding,
    standard_blocks,
    stem_attention,
)
from ..ops.arguments import check_choice, check_heads, check_type
from ..ops.local_attention import check_backend
from ..ops.operator import prefers_channels_last
from ..ops.pooling import max_pool_rounding_up
from .norm import constant_affine, norm_kind, update_running_statistics
from .plain import is_plain_pointwise

STEM_VALUES = ("mixture", "pointwise", "convolution")

# Initial size of the embeddings of offsets, and of the values beside what keeps their input's size.
_RELATIVE_STD = 0.1
_VALUE_STD = 0.06
# How much mixing logits fall at the distance of one region from its center.
_MIXING_FALL = 6.0


class AttentionStem(nn.Module):
    """Attention stem of "Stand-Alone Self-Attention in Vision Models", Section 3.2 and A.1.

    Every pixel attends to the pixels of its own 4x4 block; norm, ReLU and a 4x4 max pool over
    the same blocks follow. The values are spatially aware: a mixture of matrices whose weights
    depend on the pixel's place in the block (equations 8 and 9), shared by the heads.
    """

    __constants__ = ["is_reference"]  # a script compiles what it chooses and nothing else

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        num_heads: int = 4,
        num_mixtures: int = 4,
        values: str = "mixture",
        relative: bool = True,
        block_size: int = 4,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        backend: str | None = None,
    ):
        """
        Args:
            in_channels: channels of the image.
            out_channels: channels of the output; num_heads divides them into heads of even width.
            num_heads: number of attention heads.
            num_mixtures: number of value matrices M of equation 8.
            values: "mixture" for spatially aware values, "pointwise" for plain 1x1 ones,
                "convolution" for a block_size x block_size convolution (Table 7).
            relative: whether the logits hold the term q.r of equation 3. The paper's FLOPs
                contain it, equation 7 leaves it out.
            block_size: side of a block in pixels, and the stride.
            norm: makes the norm layer from a channel count; None for no norm.
            backend: "reference" for standard operators of PyTorch alone; of all other backends of
                :func:`sasa_det.ops.local_attention`, and None, the stem takes what is fastest.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__()
        check_heads(out_channels, num_heads, "out_channels")
        check_choice("values", values, STEM_VALUES)
        check_backend(backend)
        for name, number in {"num_mixtures": num_mixtures, "block_size": block_size}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_heads = num_heads
        self.values = values
        self.block_size = block_size
        self.stride = block_size
        self.is_reference = backend == "reference"
        self.query = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        head_width = out_channels // num_heads
        if values == "mixture":
            self.value = None
            self.value_weight = nn.Parameter(torch.empty(num_mixtures, out_channels, in_channels))
            self.row_embedding = nn.Parameter(torch.empty(block_size, head_width))
            self.col_embedding = nn.Parameter(torch.empty(block_size, head_width))
            self.mixture_embedding = nn.Parameter(torch.empty(num_mixtures, head_width))
        else:
            side = 1 if values == "pointwise" else block_size
            self.value = nn.Conv2d(in_channels, out_channels, side, bias=False)
        shape = (num_heads, head_width // 2, 2 * block_size - 1)
        for name in ("rel_rows", "rel_cols"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if relative else None)
        self.norm = nn.Identity() if norm is None else norm(out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights so that a new stem tells the regions of a block apart.

        Every value matrix starts with a region of its own, with four of them a quadrant, and
        attention starts near the mean over the block, to which all regions contribute. Random
        mixtures are incoherent, and random embeddings of offsets let the noise of single pixels
        through, of which the maximum over the block keeps the largest. The values start small: a
        step of Adam has the same size for all weights, and the norm takes out the size of values.
        """
        head_width = self.out_channels // self.num_heads
        std = self.in_channels**-0.5
        nn.init.normal_(self.query.weight, std=std * head_width**-0.5)
        nn.init.normal_(self.key.weight, std=std)
        if self.values == "mixture":
            nn.init.normal_(self.value_weight, std=_VALUE_STD * std)
            self._divide_block()
        else:
            nn.init.normal_(self.value.weight, std=self.value.weight[0].numel() ** -0.5)
        if self.rel_rows is not None:
            nn.init.normal_(self.rel_rows, std=_RELATIVE_STD)
            nn.init.normal_(self.rel_cols, std=_RELATIVE_STD)

    def _divide_block(self) -> None:
        """Set the embeddings of equation 9 so that each mixture rules a cell of a grid.

        The logits are ``-_MIXING_FALL * |place - center|^2`` in units of cells, but without the
        square of the place, which is the same for all mixtures.
        """
        num_mixtures, head_width = self.mixture_embedding.shape
        like = {"dtype": self.mixture_embedding.dtype, "device": self.mixture_embedding.device}
        rows = max(n for n in range(1, math.isqrt(num_mixtures) + 1) if num_mixtures % n == 0)
        sides = (rows, num_mixtures // rows)
        # Heads of two channels have no room for a constant, and the cells of 2 x 2 no need of it.
        basis = torch.zeros(3, head_width, **like)
        basis[:head_width] = torch.linalg.qr(torch.randn(head_width, head_width, **like))[0][:3]
        constant = basis[2]
        centers = [torch.arange(side, **like) - (side - 1) / 2 for side in sides]
        cells = torch.cartesian_prod(*centers)  # (num_mixtures, 2)
        size = _MIXING_FALL**0.5
        embedding = 2 * cells @ basis[:2] - cells.square().sum(1, keepdim=True) * constant
        self.mixture_embedding.copy_(size * embedding)
        place = (torch.arange(self.block_size, **like) + 0.5) / self.block_size - 0.5
        for target, side, direction in zip(
            (self.row_embedding, self.col_embedding), sides, basis, strict=False
        ):
            target.copy_(size * (side * place[:, None] * direction + constant / 2))

    def mixing(self) -> Tensor:
        """Return p(a, b, m) of equation 9, (num_mixtures, block_size, block_size)."""
        place = self.row_embedding[:, None] + self.col_embedding[None]
        # Not by einsum, which ONNX has since opset 12 alone.
        mixing = self.mixture_embedding @ place.flatten(0, 1).transpose(0, 1)
        return mixing.reshape(-1, self.block_size, self.block_size).softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W) in the type of the weights, any H, W >= 1.

        Returns:
            (N, out_channels, ceil(H / block_size), ceil(W / block_size)).

        Raises:
            ValueError: if the type is another one, without autocast.
        """
        if not torch.jit.is_scripting():  # alone, or TorchScript compiles what it cannot
            check_type("an attention stem", x, self.query.weight.dtype)
            return self._run(x)
        return self._pool(self._attend(x))

    def _run(self, x: Tensor) -> Tensor:
        x = self._run_fused(x) if self._is_plain() else self._pool(self._attend(x))
        if prefers_channels_last(x):
            # All layers that follow keep the layout.
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        # ReLU and the maximum commute, and after it there is a sixteenth of the pixels.
        return F.relu(max_pool_rounding_up(self.norm(x), self.block_size))

    def _run_fused(self, x: Tensor) -> Tensor:
        tensors, heads, norm = (x, *self._tensors()), self.num_heads, self.norm
        blocks = {"block_size": self.block_size, "num_heads": heads}
        kind = norm_kind(norm)
        if kind in ("nothing", "constant"):
            affine = self._ones_and_zeros() if kind == "nothing" else constant_affine(norm).terms
            if not _needs_gradient(*tensors, *affine):
                return pooled_stem_attention(*tensors, *affine, **blocks)
            if self._has_kernels(x):
                return normalized_stem_attention(*tensors, *affine, num_heads=heads, eps=None)[0]
        pixels = x.numel() // self.in_channels
        # A norm of a single value is left to PyTorch, which refuses it.
        if kind == "batch" and pixels > 1 and self._has_kernels(x):
            one, zero = self._ones_and_zeros()
            weight = one if norm.weight is None else norm.weight
            bias = zero if norm.bias is None else norm.bias
            output, mean, variance = normalized_stem_attention(
                *tensors, weight, bias, num_heads=heads, eps=norm.eps
            )
            update_running_statistics(norm, mean, variance, pixels)
            return output
        return self._pool(stem_attention(*tensors, **blocks))

    def _has_kernels(self, x: Tensor) -> bool:
        shape = (self.block_size, self.out_channels, self.num_heads)
        return x.numel() > 0 and has_stem_kernels(x, *shape)

    def _ones_and_zeros(self) -> list[Tensor]:
        """Return what stands for a norm without weights, as a scale and a shift."""
        like = self.query.weight
        return [like.new_ones(self.out_channels), like.new_zeros(self.out_channels)]

    def _is_plain(self) -> bool:
        """Tell whether the projections are no more than the weights that the operators take."""
        if self.is_reference or self.values == "convolution":
            return False
        layers = [self.query, self.key] + ([self.value] if self.values == "pointwise" else [])
        return all(is_plain_pointwise(layer) and layer.bias is None for layer in layers)

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self._project_values(x)
        embedding = relative_embedding(self.rel_rows, self.rel_cols, self.block_size)
        tensors, blocks = (query, key, value, embedding), (self.block_size, self.num_heads)
        if torch.jit.is_scripting():
            if self.is_reference:
                return standard_blocks.block_attention(*tensors, *blocks)
            else:
                return torch.ops.sasa_det.block_attention(*tensors, *blocks)
        elif self.is_reference:
            return reference.block_attention(*tensors, *blocks)
        else:
            size, heads = blocks
            return block_attention(*tensors, block_size=size, num_heads=heads)

    def _project_values(self, x: Tensor) -> Tensor:
        if self.value is None:
            return self._mix_values(x)
        if self.values == "convolution":
            # As "same" padding, so that a block's pixels see their surroundings alike.
            before, after = (self.block_size - 1) // 2, self.block_size // 2
            x = F.pad(x, (before, after, before, after))
        return self.value(x)

    def _mix_values(self, x: Tensor) -> Tensor:
        tensors = (x, self.value_weight, self.mixing())
        if torch.jit.is_scripting():
            if self.is_reference:
                return standard_blocks.mixed_values(*tensors)
            else:
                return torch.ops.sasa_det.mixed_values(*tensors)
        elif self.is_reference:
            return reference.mixed_values(*tensors)
        else:
            return mixed_values(*tensors)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        if self.values == "mixture":
            value, mixing = self.value_weight, self.mixing()
        else:
            value, mixing = self.value.weight[:, :, 0, 0][None], None
        projections = (self.query.weight, self.key.weight, value, mixing)
        return (*projections, self.rel_rows, self.rel_cols)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
