"""The attention layer that stands where a spatial convolution stood."""

import logging
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import local_attention, reference
from ..ops.arguments import check_choice, check_heads, check_kernel_size
from ..ops.local_attention import BORDERS, check_backend
from ..ops.pooling import avg_pool_rounding_up
from ..ops.product import Operand
from . import joined
from .head_norm import HeadRMSNorm, HeadUnitNorm
from .one_piece import OnePiece, infer, is_one_piece, parameters_of
from .position import sinusoidal_encoding
from .projection import project, runs_products

logger = logging.getLogger(__name__)

POSITIONS = ("relative", "absolute", "none")
QK_NORMS = ("BN", "RMS", "cosine")

# Where the heads of a new layer look first: (row, column) offsets, and the strength of it.
_FIRST_LOOKS = ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (1, 0), (0, -1), (-1, 0))
_FOCUS = 2.0
# Initial size of q.k beside what unit logits would have.
_CONTENT_STD = 0.2
# The mean of max(z, 0) for a standard normal z, and the root of its mean square.
RECTIFIED_MEAN = (2 * math.pi) ** -0.5
_RECTIFIED_SIZE = 0.5**0.5


class LocalSelfAttention2d(nn.Module):
    """Local self-attention of "Stand-Alone Self-Attention in Vision Models", Section 2.2.

    Queries, keys and values are pointwise projections of the input without bias; every pixel
    attends to the k x k pixels around it (equation 3). A stride of 2 is a 2x2 average pool that
    follows the attention (Section 3.1) and rounds sizes up, like a strided 1x1 convolution.
    """

    __constants__ = ["is_reference"]  # a script compiles what it chooses and nothing else

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
        content: bool = True,
        border: str = "mask",
        stride: int = 1,
        backend: str | None = None,
        qk_norm: str | None = None,
        scale_logits: bool = False,
    ):
        """
        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; num_heads divides them into heads of even width.
            kernel_size: odd extent k of the window.
            num_heads: number of attention heads.
            position: "relative" learns an embedding of every row and column offset; "absolute"
                adds a sinusoidal encoding to what queries and keys are projected from; "none"
                leaves position out (Table 5).
            content: False drops q.k and with it the key projection; only with position
                "relative" (Table 6).
            border: "mask" or "zero", see :func:`sasa_det.ops.local_attention`.
            stride: 1 or 2.
            backend: see :func:`sasa_det.ops.local_attention`.
            qk_norm: a norm behind the projections of queries and keys, which equation 3 does not
                have and which keeps q.k from growing with them; None for none. The query of q.r is
                the normalized one as well. "BN" is batch norm. "RMS" divides each head by its root
                mean square and multiplies every channel by a learned scale. "cosine" gives each
                head of the queries the length 1 and of the keys a learned length, so that q.k is a
                cosine times a learned temperature of the head, and q.r is the product of the
                embedding with a query of length 1, without the temperature.
            scale_logits: whether q.k + q.r is multiplied by 1 / sqrt(head width), as in
                "Attention Is All You Need".

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__()
        check_kernel_size(kernel_size)
        check_heads(out_channels, num_heads, "out_channels")
        check_backend(backend)
        check_choice("position", position, POSITIONS)
        check_choice("border", border, BORDERS)
        if qk_norm is not None:
            check_choice("qk_norm", qk_norm, QK_NORMS)
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride!r}.")
        if not content and position != "relative":
            raise ValueError(
                f"content=False leaves only q.r and needs position 'relative', got {position!r}."
            )
        if position == "absolute" and in_channels % 4:
            raise ValueError(
                f"in_channels must be a multiple of 4 for position 'absolute', got {in_channels}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.position = position
        self.content = content
        self.border = border
        self.stride = stride
        self.backend = backend
        self.is_reference = backend == "reference"
        self.qk_norm = qk_norm
        self.scale_logits = scale_logits
        self.query = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key = nn.Conv2d(in_channels, out_channels, 1, bias=False) if content else None
        self.value = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.query_norm = self._make_norm(is_key=False)
        self.key_norm = self._make_norm(is_key=True) if content else None
        shape = (num_heads, out_channels // num_heads // 2, kernel_size)
        for name in ("rel_rows", "rel_cols"):
            embedding = nn.Parameter(torch.empty(shape)) if position == "relative" else None
            self.register_parameter(name, embedding)
        self.reset_parameters()

    def _make_norm(self, is_key: bool) -> nn.Module | None:
        if self.qk_norm == "BN":
            return nn.BatchNorm2d(self.out_channels)
        if self.qk_norm == "RMS":
            return HeadRMSNorm(self.out_channels, self.num_heads)
        if self.qk_norm == "cosine":
            return HeadUnitNorm(self.num_heads, scaled=is_key)
        return None

    @property
    def logit_factor(self) -> float:
        """What the logits are multiplied by, with ``scale_logits``, or 1."""
        return (self.out_channels // self.num_heads) ** -0.5 if self.scale_logits else 1.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights so that every head starts by looking at a pixel of its own choice.

        Random embeddings make a near-uniform average of every window, and a stack of such layers
        a blur from which learning is slow. Here the embeddings of head n fall off with the square
        of the distance from the n-th of the nine places of a 3 x 3 window, and the queries hold a
        constant that picks them up: attention starts as a soft 3 x 3 convolution (after Cordonnier
        et al., "On the Relationship between Self-Attention and Convolutional Layers", ICLR 2020).
        The constant is the mean over channels of a rectified input, such as layers here have.
        The rest of the queries carries the 1/sqrt(d) that the paper's logits do without, and q.k
        starts small beside the embeddings: at random it would only blur where heads look.

        With norms of queries and keys, or scaled logits, the logits start equally large.
        """
        if self.value.weight.is_meta:
            return  # Models that are counted have no values, and going through the motions is slow.
        head_width = self.out_channels // self.num_heads
        std = self.in_channels**-0.5
        content_std = _CONTENT_STD if self.position == "relative" else 1.0
        nn.init.normal_(self.query.weight, std=std * head_width**-0.5)
        if self.key is not None:
            nn.init.normal_(self.key.weight, std=content_std * std)
        nn.init.normal_(self.value.weight, std=std)
        constant = torch.zeros(self.out_channels)
        if self.rel_rows is not None:
            constant = self._look_at_neighbours()
            self.query.weight += constant.view(-1, 1, 1, 1) / (self.in_channels * RECTIFIED_MEAN)
        self._reset_sizes(constant, content_std)

    def _look_at_neighbours(self) -> Tensor:
        """Set the embeddings; return the constant (out_channels,) of the queries for them."""
        head_width = self.out_channels // self.num_heads
        offset = torch.arange(self.kernel_size) - self.kernel_size // 2
        centers = torch.tensor(_FIRST_LOOKS).repeat(-(-self.num_heads // len(_FIRST_LOOKS)), 1)
        directions = []
        for embedding, center in zip((self.rel_rows, self.rel_cols), centers.T, strict=True):
            direction = F.normalize(torch.randn(self.num_heads, head_width // 2), dim=1)
            distance = offset - center[: self.num_heads, None]
            nn.init.normal_(embedding, std=0.3)
            # Capped, so that pixels further away keep a weight to learn from.
            fall = _FOCUS * distance.square().clamp(max=4)
            embedding -= direction[:, :, None] * fall[:, None]
            directions.append(direction)
        return torch.cat(directions, 1).flatten()

    def _reset_sizes(self, constant: Tensor, content_std: float) -> None:
        """Let the logits of a rectified input start with the size they have in equation 3.

        Args:
            constant: (out_channels,), of the queries; its length in each head is sqrt(2), or 0.
            content_std: the standard deviation of the keys of an input of size 1.
        """
        head_width = self.out_channels // self.num_heads
        unscaled = 1 / self.logit_factor
        query_std = _RECTIFIED_SIZE * head_width**-0.5
        key_std = _RECTIFIED_SIZE * content_std
        query_length = (constant.square().sum() / self.num_heads + _RECTIFIED_SIZE**2).sqrt()
        if self.qk_norm is None:
            self.query.weight *= unscaled
        elif self.qk_norm == "BN":
            # It takes the mean out of the queries: its bias is their constant.
            nn.init.constant_(self.query_norm.weight, unscaled * query_std)
            self.query_norm.bias.copy_(unscaled * constant)
            if self.key_norm is not None:
                nn.init.constant_(self.key_norm.weight, key_std)
                nn.init.zeros_(self.key_norm.bias)
        elif self.qk_norm == "RMS":
            self.query_norm.channel_scale.fill_(unscaled * query_length * head_width**-0.5)
            if self.key_norm is not None:
                self.key_norm.channel_scale.fill_(key_std)
        else:
            for embedding in (self.rel_rows, self.rel_cols):
                if embedding is not None:
                    embedding *= unscaled * query_length
            if self.key_norm is not None:
                temperature = unscaled * query_length * key_std * head_width**0.5
                self.key_norm.logit_scale.fill_(temperature.log())

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W), floating point, any H, W >= 1.

        Returns:
            (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        if not torch.jit.is_scripting():
            if runs_products(x):
                if is_one_piece(self):
                    return self.pool(self._run_one_piece(x))
                if self.query_norm is not None:
                    _say_once(self.query_norm.__class__.__name__)
            elif joined.is_joined(self, x):
                return joined.attend(self, x)
        tensors = (*self.project(x), self.rel_rows, self.rel_cols)
        if torch.jit.is_scripting():  # which takes operators and no keyword-only defaults
            window = (self.kernel_size, self.num_heads, self.border == "mask")
            if self.is_reference:
                x = reference.local_attention_of_script(*tensors, *window)
            else:
                backend = "" if self.backend is None else self.backend
                x = torch.ops.sasa_det.local_attention(*tensors, *window, backend)[0]
        else:
            x = local_attention(
                *tensors,
                kernel_size=self.kernel_size,
                num_heads=self.num_heads,
                border=self.border,
                content=self.content,
                backend=self.backend,
            )
        return self.pool(x)

    def pool(self, x: Tensor) -> Tensor:
        """Return the 2x2 average pool of a stride of 2, and the input for a stride of 1."""
        if self.stride == 2:
            x = avg_pool_rounding_up(x, 2)
        return x

    @torch.jit.unused
    def _run_one_piece(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return infer(self, Operand(x))
        return OnePiece.apply(x, self, *parameters_of(self))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the queries, keys (None without ``content``) and values of an input.

        The first two are those of the operator: with their norms and the scale of the logits.
        """
        placed = x
        if self.position == "absolute":
            height, width = x.shape[2:]
            placed = x + sinusoidal_encoding(
                self.in_channels, height, width, dtype=x.dtype, device=x.device
            )
        key: Tensor | None = None
        if torch.jit.is_scripting() or self.is_reference:
            # Scripts pass no modules to functions.
            if self.key is not None:
                key = self.key(placed)
            query, value = self.query(placed), self.value(x)
        else:
            if self.key is None:
                query, value = project(x, (self.query, self.value))
            elif placed is x:
                query, key, value = project(x, (self.query, self.key, self.value))
            else:
                query, key = project(placed, (self.query, self.key))
                (value,) = project(x, (self.value,))
        # Under autocast some norms return float32.
        if self.query_norm is not None:
            query = self.query_norm(query).to(value.dtype)
        if self.key_norm is not None and key is not None:
            key = self.key_norm(key).to(value.dtype)
        if self.scale_logits:
            query = query * self.logit_factor
        return query, key, value

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_heads={self.num_heads}, position={self.position!r}, content={self.content}, "
            f"border={self.border!r}, stride={self.stride}"
            + (f", qk_norm={self.qk_norm!r}" if self.qk_norm is not None else "")
            + (", scale_logits=True" if self.scale_logits else "")
        )


@lru_cache(None)
def _say_once(norm: str) -> None:
    logger.info(
        "Attention with %s on queries and keys runs layer by layer: the kernels that run "
        "projections and attention as one piece have no such norm.",
        norm,
    )
