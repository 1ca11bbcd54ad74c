"""The public operation: its contract, and what of its arguments the operator does not see."""

import torch
from torch import Tensor

from . import reference, tiled_attention
from .arguments import check_arguments, check_choice
from .exporting import is_making_onnx, wants_forward_gradients
from .operator import BACKENDS

BORDERS = ("mask", "zero")
_NAMES = (*BACKENDS, "reference")
_operator = torch.ops.sasa_det.local_attention.default


def available_backends() -> dict[str, str]:
    """Name the backends of :func:`local_attention` that this installation has, fastest first.

    Returns:
        dict[str, str]: backend name to what it is.
    """
    summaries = {name: backend.SUMMARY for name, backend in BACKENDS.items() if not backend.MISSING}
    return {**summaries, "reference": reference.SUMMARY}


def check_backend(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of a backend."""
    if backend is not None and backend not in _NAMES:
        raise ValueError(f"backend must be None or one of {list(_NAMES)}, got {backend!r}.")


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
        backend: "cpu", "cuda", "triton", "loop" or "reference"; None takes the first of them that
            can run here, and "reference" where forward-mode gradients may be asked for.

    Returns:
        (N, C, H, W) in the type of ``value``.

    While ``torch.onnx.export`` runs, the result comes from standard operators, which ONNX has.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
        RuntimeError: if a backend that was asked for cannot run here, with the reason.
    """
    check_choice("border", border, BORDERS)
    check_backend(backend)
    if backend != "reference" and wants_forward_gradients():
        if backend is not None:
            raise RuntimeError(
                f"backend {backend!r} has no forward-mode gradients; 'reference' has them."
            )
        backend = "reference"
    if not content:
        key = None
    elif key is None:
        raise ValueError("key must be given unless content is False, got None.")
    arguments = (query, key, value, rel_rows, rel_cols, kernel_size, num_heads)
    mask = border == "mask"
    # The operator checks them too, but takes True for an integer, and a compiler would wrap what
    # it raises.
    integers = type(kernel_size) is int and type(num_heads) is int
    making_onnx = is_making_onnx()
    if not integers or making_onnx or backend == "reference" or torch.compiler.is_compiling():
        check_arguments(*arguments)
    if making_onnx:
        at_once = torch.compiler.is_exporting()
        return tiled_attention.local_attention(*arguments, mask, heads_at_once=at_once)
    if backend == "reference":
        return reference.local_attention(*arguments, mask)
    return _operator(*arguments, mask, backend or "")[0]
