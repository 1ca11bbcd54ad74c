"""What a backbone says when its training begins."""

import logging
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ...config.recipe import warn_of_unread

logger = logging.getLogger(__name__)


class WarnsInTraining(nn.Module):
    """A backbone that names what will be missing from its training.

    That are keys of a recipe that are not read, and frozen batch norms without statistics, which do
    not normalize. Weights are often loaded after the first call of ``train``: norms are looked at
    in the first forward pass.

    Attributes:
        recipe_keys (tuple[str, ...]): :func:`sasa_det.config.recipe.recipe_keys` of the config that
            it was built from.
    """

    # Not annotated, for TorchScript.
    recipe_keys = ()
    watches_norms = False

    def train(self, mode: bool = True) -> "WarnsInTraining":
        if mode and self.recipe_keys:
            warn_of_unread(self.recipe_keys)
            self.recipe_keys = ()
        if mode and not self.watches_norms:
            self.watches_norms = True
            if any(isinstance(module, FrozenBatchNorm2d) for module in self.modules()):
                _Watch(self)
        return super().train(mode)


class _Watch:
    """A hook of a backbone until its first forward pass."""

    def __init__(self, backbone: nn.Module):
        self._handle = backbone.register_forward_pre_hook(self)

    def __call__(self, backbone: nn.Module, inputs: Any) -> None:
        self._handle.remove()
        frozen = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
        has_values = not any(module.running_mean.is_meta for module in frozen)
        if backbone.training and has_values and frozen and all(map(_has_no_statistics, frozen)):
            logger.warning(
                "The frozen batch norms of the backbone have no statistics of a training and do "
                "not normalize, so that losses begin at hundreds and more: start from pretrained "
                "weights (MODEL.WEIGHTS), or set MODEL.RESNETS.NORM (MODEL.SAN.NORM) to BN or "
                "SyncBN and MODEL.BACKBONE.FREEZE_AT to 0."
            )


def _has_no_statistics(norm: FrozenBatchNorm2d) -> bool:
    """Return whether a norm is as it was made, with or without a norm that it was made from."""
    mean, variance = norm.running_mean, norm.running_var
    return not mean.any() and bool(torch.allclose(variance, torch.ones_like(variance), atol=1e-4))
