"""Mixtures of value matrices, one for each place of a block (equation 8 of the paper)."""

import torch
from torch import Tensor

__all__ = ["mixture_gradients", "place_matrices"]


def place_matrices(weight: Tensor, mixing: Tensor) -> Tensor:
    """Mix the matrices of every place of a block.

    Args:
        weight: (M, C, C_in), the matrices W_V^m.
        mixing: (M, b, b), the weights p(a, b, m), in the type of ``weight``.

    Returns:
        (b * b, C, C_in).
    """
    return torch.einsum("mp,mci->pci", mixing.flatten(1), weight)


def mixture_gradients(
    grad_matrices: Tensor, weight: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and mixing from those of :func:`place_matrices`."""
    grad_weight = torch.einsum("mp,pci->mci", mixing.flatten(1), grad_matrices)
    grad_mixing = torch.einsum("pci,mci->mp", grad_matrices, weight)
    return grad_weight, grad_mixing.reshape(mixing.shape)
