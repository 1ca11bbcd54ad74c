"""The attention layer that stands where a spatial convolution stood."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import local_attention
from ..ops.arguments import check_choice, check_heads, check_kernel_size
from ..ops.local_attention import BORDERS, check_backend
from ..ops.product import Operand
from .one_piece import OnePiece, infer, is_one_piece, parameters_of
from .position import sinusoidal_encoding
from .projection import project, runs_products

POSITIONS = ("relative", "absolute", "none")

# Where the heads of a new layer look first: (row, column) offsets, and the strength of it.
_FIRST_LOOKS = ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (1, 0), (0, -1), (-1, 0))
_FOCUS = 2.0
# Initial size of q.k beside what unit logits would have.
_CONTENT_STD = 0.2
# The mean of max(z, 0) for a standard normal z.
RECTIFIED_MEAN = (2 * math.pi) ** -0.5


class LocalSelfAttention2d(nn.Module):
    """Local self-attention of "Stand-Alone Self-Attention in Vision Models", Section 2.2.

    Queries, keys and values are pointwise projections of the input without bias; every pixel
    attends to the k x k pixels around it (equation 3). A stride of 2 is a 2x2 average pool that
    follows the attention (Section 3.1) and rounds sizes up, like a strided 1x1 convolution.
    """

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

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        super().__init__()
        check_kernel_size(kernel_size)
        check_heads(out_channels, num_heads, "out_channels")
        check_backend(backend)
        check_choice("position", position, POSITIONS)
        check_choice("border", border, BORDERS)
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
        self.query = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.key = nn.Conv2d(in_channels, out_channels, 1, bias=False) if content else None
        self.value = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        shape = (num_heads, out_channels // num_heads // 2, kernel_size)
        for name in ("rel_rows", "rel_cols"):
            embedding = nn.Parameter(torch.empty(shape)) if position == "relative" else None
            self.register_parameter(name, embedding)
        self.reset_parameters()

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
        """
        head_width = self.out_channels // self.num_heads
        std = self.in_channels**-0.5
        nn.init.normal_(self.query.weight, std=std * head_width**-0.5)
        if self.key is not None:
            content_std = _CONTENT_STD if self.position == "relative" else 1.0
            nn.init.normal_(self.key.weight, std=content_std * std)
        nn.init.normal_(self.value.weight, std=std)
        if self.rel_rows is None:
            return
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
        constant = torch.cat(directions, 1).reshape(-1, 1, 1, 1)
        self.query.weight += constant / (self.in_channels * RECTIFIED_MEAN)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W), floating point, any H, W >= 1.

        Returns:
            (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        if not torch.jit.is_scripting():
            if runs_products(x) and is_one_piece(self):
                return self.pool(self._run_one_piece(x))
        tensors = (*self.project(x), self.rel_rows, self.rel_cols)
        if torch.jit.is_scripting():  # which takes operators and no keyword-only defaults
            x = torch.ops.sasa_det.local_attention(
                *tensors,
                self.kernel_size,
                self.num_heads,
                self.border == "mask",
                "" if self.backend is None else self.backend,
            )[0]
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
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return x

    @torch.jit.unused
    def _run_one_piece(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return infer(self, Operand(x))
        return OnePiece.apply(x, self, *parameters_of(self))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the queries, keys (None without ``content``) and values of an input."""
        placed = x
        if self.position == "absolute":
            height, width = x.shape[2:]
            placed = x + sinusoidal_encoding(
                self.in_channels, height, width, dtype=x.dtype, device=x.device
            )
        if torch.jit.is_scripting():  # which passes no modules to functions
            key: Tensor | None = None
            if self.key is not None:
                key = self.key(placed)
            return self.query(placed), key, self.value(x)
        else:
            if self.key is None:
                query, value = project(x, (self.query, self.value))
                return query, None, value
            if placed is x:
                return project(x, (self.query, self.key, self.value))
            return (*project(placed, (self.query, self.key)), *project(x, (self.value,)))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_heads={self.num_heads}, position={self.position!r}, content={self.content}, "
            f"border={self.border!r}, stride={self.stride}"
        )
