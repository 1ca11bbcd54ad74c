"""Tensors that an operator's call may leave out, and what stands for their gradients.

Operators of ``torch.library`` return no None: an absent tensor's gradient is an empty one.
"""

from collections.abc import Iterable

from torch import Tensor

__all__ = ["fake_gradients", "present_gradients"]


def fake_gradients(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Return what a backward operator returns, without values.

    Args:
        tensors: the tensors that gradients are of; None for an absent one.
        like: has the type and device of an absent one's empty gradient.

    Returns:
        tuple[Tensor, ...]: contiguous, of the tensors' shapes, (0,) for an absent one.
    """
    return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def present_gradients(
    grads: Iterable[Tensor], tensors: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return what autograd wants of a backward operator's gradients: None for absent tensors."""
    return tuple(None if x is None else g for g, x in zip(grads, tensors, strict=True))
