"""The public operation: its contract, its checks and the choice of a backend."""

from collections.abc import Collection

from torch import Tensor

from . import reference
from .operator import BACKENDS, attend

BORDERS = ("mask", "zero")
_NAMES = (*BACKENDS, "reference")


def available_backends() -> dict[str, str]:
    """Name the backends of :func:`local_attention` that this installation has, fastest first.

    Returns:
        dict[str, str]: backend name to what it is.
    """
    summaries = {name: backend.SUMMARY for name, backend in BACKENDS.items() if not backend.MISSING}
    return {**summaries, "reference": reference.SUMMARY}


def check_choice(name: str, value: object, allowed: Collection) -> None:
    """Raise ValueError, with ``name`` in it, unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless the window extent is an odd integer of at least 1."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
        raise ValueError(f"kernel_size must be an odd integer >= 1, got {kernel_size!r}.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}.")


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of a backend."""
    if backend is not None and backend not in _NAMES:
        raise ValueError(f"backend must be None or one of {list(_NAMES)}, got {backend!r}.")


def check_heads(channels: int, num_heads: int, name: str = "channels") -> None:
    """Raise ValueError unless ``num_heads`` divides ``channels`` into heads of even width."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}.")
    if channels % num_heads:
        raise ValueError(f"{name} {channels} must be a multiple of num_heads {num_heads}.")
    if channels // num_heads % 2:
        raise ValueError(
            f"{name} {channels} over num_heads {num_heads} gives heads of width "
            f"{channels // num_heads}; the width must be even, half for the row and half for the "
            "column embedding."
        )


def local_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    kernel_size: int,
    num_heads: int,
    border: str = "mask",
    content: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Let every pixel attend to the k x k pixels around it, with 2-D relative embeddings.

    Equation 3 of "Stand-Alone Self-Attention in Vision Models" for every head n and pixel ij::

        y_ij = sum_ab softmax_ab(q_ij . k_ab + q_ij . r_(a-i, b-j)) v_ab

    without a 1/sqrt(d) scale. r_(a-i, b-j) concatenates a row and a column embedding, each of
    half the head's width. Logits, softmax and sums are float32 (float64 for float64 inputs)
    whatever the input type.

    Args:
        query: (N, C, H, W), floating point; head n holds the channels n C/num_heads and on.
        key: as query. May be None when ``content`` is False.
        value: as query.
        rel_rows: (num_heads, C // num_heads // 2, kernel_size); entry o is the embedding of row
            offset o - kernel_size // 2. None, together with rel_cols, for no embedding.
        rel_cols: the same for column offsets.
        kernel_size: the odd extent k of the window.
        num_heads: number of heads; it divides C into heads of even width.
        border: "mask" leaves neighbours outside the image out of the softmax; "zero" treats them
            as zero keys and values, which keep their logit q . r.
        content: False drops the term q . k (Table 6 of the paper).
        backend: "cpu", "triton", "loop" or "reference"; None takes the first of them that can run
            here.

    Returns:
        (N, C, H, W) in the type of ``value``.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if a backend that was asked for cannot run here, with the reason.
    """
    _check(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, border, content)
    check_backend(backend)
    key = key if content else None
    arguments = (query, key, value, rel_rows, rel_cols, kernel_size, num_heads, border == "mask")
    if backend == "reference":
        return reference.local_attention(*arguments)
    return attend(*arguments, backend or "")[0]


def _check(query, key, value, rel_rows, rel_cols, kernel_size, num_heads, border, content):
    check_kernel_size(kernel_size)
    if query.dim() != 4:
        raise ValueError(f"query must be (N, C, H, W), got shape {tuple(query.shape)}.")
    check_heads(query.shape[1], num_heads)
    if min(query.shape[1:]) < 1:
        raise ValueError(f"query must have C, H, W >= 1, got shape {tuple(query.shape)}.")
    check_choice("border", border, BORDERS)
    if content and key is None:
        raise ValueError("key must be given unless content is False, got None.")
    images = {"query": query, "value": value, **({"key": key} if content else {})}
    for name, tensor in images.items():
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name} must have query's shape {tuple(query.shape)}, got {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have query's type and device, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}."
            )
    if (rel_rows is None) != (rel_cols is None):
        raise ValueError("rel_rows and rel_cols must be given together or both be None.")
    if rel_rows is None:
        if not content:
            raise ValueError("content=False leaves only q.r and so needs rel_rows and rel_cols.")
        return
    shape = (num_heads, query.shape[1] // num_heads // 2, kernel_size)
    for name, tensor in {"rel_rows": rel_rows, "rel_cols": rel_cols}.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be (num_heads, C // num_heads // 2, kernel_size) = {shape}, "
                f"got {tuple(tensor.shape)}."
            )
