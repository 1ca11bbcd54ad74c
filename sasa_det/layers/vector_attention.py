"""Pairwise and patchwise self-attention: layers whose weights are vectors, one for each channel.

Their borders are reflected. A side of at most ``kernel_size // 2`` pixels is too short for that and
reflected back and forth; see :func:`sasa_det.ops.aggregation.reflect`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..ops import vector_aggregation
from ..ops.aggregation import aggregate, at_least_one, reflect
from ..ops.arguments import check_choice, check_kernel_size
from ..ops.local_attention import check_backend
from ..ops.precision import accumulation_dtype, autocast_disabled
from .mapping import Mapping, say_once, why_not
from .pairwise_mapping import pairwise_mapping
from .patchwise_mapping import patchwise_mapping
from .projection import project

# The first one of each is that of the paper's models.
PAIRWISE_RELATIONS = (
    "subtraction",
    "summation",
    "concatenation",
    "hadamard_product",
    "dot_product",
)
PATCHWISE_RELATIONS = ("concatenation", "star_product", "clique_product")


class _VectorAttention2d(nn.Module):
    kind: str
    relations: tuple[str, ...]
    __constants__ = ["is_reference"]  # a script compiles what it chooses and nothing else

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        relation: str | None = None,
        relation_channels: int | None = None,
        share_channels: int = 8,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        backend: str | None = None,
    ):
        """
        Args:
            in_channels: channels of the input.
            out_channels: channels m of the output.
            kernel_size: odd extent of the window.
            relation: one of the layer's relations; the first of them if None.
            relation_channels: channels r of queries and keys, a quarter of out_channels if None.
            share_channels: output channels that share a weight.
            norm: makes the norm layers of the weights from a channel count; None for no norm. In
                pairwise attention their inputs are (N, C, kernel_size^2, H W).
            backend: "reference" for the layer as written, in standard operators of PyTorch alone;
                of all other backends of :func:`sasa_det.ops.local_attention`, and None, the layer
                takes what is fastest.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__()
        check_kernel_size(kernel_size)
        if relation is None:
            relation = self.relations[0]
        check_choice("relation", relation, self.relations)
        check_backend(backend)
        if share_channels < 1 or out_channels % share_channels:
            raise ValueError(
                f"out_channels {out_channels} must be a multiple of share_channels "
                f"{share_channels}."
            )
        if relation_channels is None:
            relation_channels = max(out_channels // 4, 1)
        if relation_channels < 1:
            raise ValueError(f"relation_channels must be at least 1, got {relation_channels}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.relation = relation
        self.is_reference = backend == "reference"
        self.relation_channels = relation_channels
        self.groups = out_channels // share_channels
        self.query = nn.Conv2d(in_channels, relation_channels, 1)
        self.key = nn.Conv2d(in_channels, relation_channels, 1)
        self.value = nn.Conv2d(in_channels, out_channels, 1)

        inputs, hidden, outputs = self._weight_channels()
        norm = norm or (lambda channels: nn.Identity())
        # The mapping gamma from relations to weights.
        self.weights = nn.Sequential(
            norm(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, hidden, 1, bias=False),
            norm(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1),
        )

    def _weight_channels(self) -> tuple[int, int, int]:
        """Return the channels before, within and behind the mapping from relations to weights."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W), floating point, any H, W >= 1.

        Returns:
            (N, out_channels, H, W).
        """
        if torch.jit.is_scripting() or self.is_reference:
            # Scripts pass no modules to functions.
            query, key, value = self.query(x), self.key(x), self.value(x)
            weights = self.window_weights(query, key)
            if self.is_reference:
                return aggregate(value, weights, kernel_size=self.kernel_size)
            else:
                return torch.ops.sasa_det.vector_aggregation(weights, value, self.kernel_size)
        else:
            return self.attend(*project(x, (self.query, self.key, self.value)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Do what the layer does with its projections.

        Args:
            query, key: (N, relation_channels, H, W).
            value: (N, out_channels, H, W).

        Returns:
            (N, out_channels, H, W).
        """
        if self.is_reference:
            return aggregate(value, self.window_weights(query, key), kernel_size=self.kernel_size)
        reason = why_not(self.weights, query, self._count(query))
        if not torch.compiler.is_compiling():  # programs cannot log
            say_once(f"{self.kind} ({self.relation})", reason)
        if reason is None:
            return self.mapping(query, key).aggregate(value, self.kernel_size)
        return vector_aggregation(self.window_weights(query, key), value, self.kernel_size)

    def window_weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the weights, (N, out_channels / share_channels, kernel_size^2, H, W).

        All relations are in memory, several times.

        Args:
            query, key: (N, relation_channels, H, W).
        """
        raise NotImplementedError

    def mapping(self, query: Tensor, key: Tensor) -> Mapping:
        """Return how to do what :meth:`window_weights` does without storing relations."""
        raise NotImplementedError

    def _count(self, query: Tensor) -> int:
        """Return how many values of a channel of the relation the norm in front of gamma sees."""
        return query.numel() // query.shape[1]

    def _windows(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, kernel_size^2, H W), borders reflected."""
        padded = reflect(x, self.kernel_size // 2)
        n, channels, height, width = x.shape
        unfolded = F.unfold(padded, self.kernel_size)
        # Not unflatten, which ONNX has since opset 13 alone.
        return unfolded.reshape(n, channels, self.kernel_size * self.kernel_size, height * width)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"relation={self.relation!r}, groups={self.groups}"
        )


class PairwiseAttention2d(_VectorAttention2d):
    """Pairwise self-attention of "Exploring Self-attention for Image Recognition", Section 3.1.

    The weights of pixel j for pixel i are a function of the two pixels' features, compared by
    subtraction, summation, concatenation, hadamard_product or dot_product, and of their relative
    position, normalized over the window by a softmax: a set operator.
    """

    kind = "pairwise"
    relations = PAIRWISE_RELATIONS

    def __init__(self, *args: Any, position_size: int = 0, **options: Any):
        """
        Args:
            args, options: as of :class:`PatchwiseAttention2d`.
            position_size: positions run from -1 to 1 over ``position_size`` pixels, whatever the
                size of the image, so that a weight learned at one size holds at another; 0 lets
                them run from -1 to 1 over the image, as published.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__(*args, **options)
        if position_size != 0 and position_size < 2:
            raise ValueError(f"position_size must be 0 or at least 2, got {position_size}.")
        self.position_size = position_size
        self.position = nn.Conv2d(2, 2, 1)

    def _weight_channels(self) -> tuple[int, int, int]:
        hidden = self.relation_channels
        channels = {"concatenation": 2 * hidden, "dot_product": 1}.get(self.relation, hidden)
        return channels + 2, hidden, self.groups

    def window_weights(self, query: Tensor, key: Tensor) -> Tensor:
        n, _, height, width = query.shape
        positions = self._relative_positions(height, width, query).expand(n, -1, -1, -1)
        relation = self._relate(query.flatten(2).unsqueeze(2), self._windows(key))
        weights = self.weights(torch.cat([relation, positions], 1))
        weights = weights.softmax(2, dtype=accumulation_dtype(weights.dtype))
        return weights.reshape(n, self.groups, self.kernel_size * self.kernel_size, height, width)

    def mapping(self, query: Tensor, key: Tensor) -> Mapping:
        """See :func:`sasa_det.layers.pairwise_mapping.pairwise_mapping`."""
        return pairwise_mapping(self, query, key)

    def _count(self, query: Tensor) -> int:
        return query.numel() // query.shape[1] * self.kernel_size**2

    def _relate(self, query: Tensor, keys: Tensor) -> Tensor:
        """Compare queries (N, r, 1, P) and keys (N, r, kernel_size^2, P)."""
        if self.relation == "subtraction":
            return query - keys
        if self.relation == "summation":
            return query + keys
        if self.relation == "concatenation":
            return torch.cat([query.expand_as(keys), keys], 1)
        product = query * keys
        return product if self.relation == "hadamard_product" else product.sum(1, keepdim=True)

    def _relative_positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return p_i - p_j for the places j of every pixel's window, (1, 2, kernel_size^2, H W)."""
        positions = self.positions(height, width, like)
        positions = positions.flatten(2).unsqueeze(2) - self._windows(positions)
        return positions.to(like.dtype)

    def positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return the linear map of the places of all pixels, (1, 2, H, W), in float32 at least."""
        # Half precision cannot tell the positions of neighbours apart.
        dtype = accumulation_dtype(like.dtype)
        cols = self._coordinates(width, dtype, like.device).expand(height, width)
        rows = self._coordinates(height, dtype, like.device)[:, None].expand(height, width)
        grid = torch.stack([cols, rows])[None]
        # Neither a script nor a trace can call a module with other weights.
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            positions = self.position(grid.to(like.dtype)).to(dtype)
        else:
            weights = {name: weight.to(dtype) for name, weight in self.position.named_parameters()}
            with autocast_disabled(like.device):
                positions = functional_call(self.position, weights, grid)
        return positions

    def _coordinates(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Not linspace, which fixes the size in a program, and is NaN for a size of 1 in ONNX.
        last = self.position_size - 1 if self.position_size else at_least_one(size - 1)
        return torch.arange(-last, 2 * size - last, 2, dtype=dtype, device=device) / last


class PatchwiseAttention2d(_VectorAttention2d):
    """Patchwise self-attention of "Exploring Self-attention for Image Recognition", Section 3.2.

    The weights of a pixel's window are a function of all features in it, in their order, and may
    be of any size and sign. It is more general than a convolution, whose weights are constants.
    They see the concatenation of the pixel's query and all keys, the star_product of the query
    with every key, or the clique_product of all queries with all keys.
    """

    kind = "patchwise"
    relations = PATCHWISE_RELATIONS

    def _weight_channels(self) -> tuple[int, int, int]:
        window = self.kernel_size**2
        channels = {
            "concatenation": self.relation_channels * (window + 1),
            "star_product": window,
            "clique_product": window**2,
        }[self.relation]
        return channels, self.groups, self.groups * window

    def window_weights(self, query: Tensor, key: Tensor) -> Tensor:
        n, _, height, width = query.shape
        relation = self._relate(query, self._windows(key))
        weights = self.weights(relation.reshape(n, relation.shape[1], height, width))
        return weights.reshape(n, self.groups, self.kernel_size * self.kernel_size, height, width)

    def mapping(self, query: Tensor, key: Tensor) -> Mapping:
        """See :func:`sasa_det.layers.patchwise_mapping.patchwise_mapping`."""
        return patchwise_mapping(self, query, key)

    def _relate(self, query: Tensor, keys: Tensor) -> Tensor:
        """Describe all windows, (N, C, H W), by queries (N, r, H, W) and keys (N, r, k^2, H W)."""
        if self.relation == "concatenation":
            return torch.cat([query.flatten(2), keys.flatten(1, 2)], 1)
        if self.relation == "star_product":
            return (query.flatten(2).unsqueeze(2) * keys).sum(1)
        # Not by einsum, which ONNX has since opset 12 alone.
        queries = self._windows(query).permute(0, 3, 2, 1)
        return (queries @ keys.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
