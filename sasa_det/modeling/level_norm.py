"""Batch norms of the levels that a head serves, with their shared scale and shift in one piece."""

import torch
from detectron2.layers import CycleBatchNormList
from torch import Tensor, nn


class LevelBatchNorm(CycleBatchNormList):
    """detectron2's norms of levels, whose scale and shift are part of the norm.

    detectron2 multiplies and adds behind the norm, which stores two more maps of every level, in
    float32 under autocast too, and takes about as long as the norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, C, H, W), of the level whose turn it is.

        Returns:
            (N, C, H, W).
        """
        # A compiler does not follow the norm's weight.
        if not self._affine or torch.compiler.is_compiling():
            return super().forward(x)
        norm = self[self._pos]
        norm.weight, norm.bias = self.weight, self.bias
        try:
            normed = norm(x)
        finally:
            norm.weight = norm.bias = None
        self._pos = (self._pos + 1) % len(self)
        return normed


def join_level_norms(module: nn.Module) -> nn.Module:
    """Let detectron2's norms of levels in a module run in one piece; return the module.

    Parameters and names in the state dict stay.
    """
    for child in module.modules():
        if type(child) is CycleBatchNormList:
            child.__class__ = LevelBatchNorm
    return module
