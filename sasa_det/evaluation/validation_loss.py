"""The losses on data that is not trained on."""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.seeding import seeded


def modules_with_loss_normalizer(model: nn.Module) -> dict[str, nn.Module]:
    """Return the dense detectors in a model, which average ``loss_normalizer`` in training.

    In a keypoint head it is an option, which may be "visible".
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "loss_normalizer") and not isinstance(module, BaseKeypointRCNNHead)
    }


def validation_losses(
    model: nn.Module, batches: Iterable[list[dict[str, Any]]]
) -> dict[str, float]:
    """Average a model's training losses over batches without training on them.

    Batch norms use their running statistics and keep them. The loss normalizers of dense detectors
    begin anew with every batch, so that losses of different times compare, and are restored. The
    result is that of all processes.

    Args:
        model: returns a dict of losses in training mode; its modes are restored.
        batches: lists of inputs with "instances".

    Returns:
        dict: mean losses a batch, and their sum, "total_loss".
    """
    modes = {module: module.training for module in model.modules()}
    normalizers = {m: m.loss_normalizer for m in modules_with_loss_normalizer(model).values()}
    model.train()
    for module in modes:
        if isinstance(module, (_BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
    totals: dict[str, float] = {}
    count = 0
    try:
        # The models write what they count into the storage: not into the run's own.
        with torch.no_grad(), EventStorage(), seeded(0):
            for batch in batches:
                for module in normalizers:
                    del module.loss_normalizer
                for name, loss in model(batch).items():
                    totals[name] = totals.get(name, 0.0) + float(loss)
                count += 1
    finally:
        for module, training in modes.items():
            module.training = training
        for module, value in normalizers.items():
            module.loss_normalizer = value
    shares = comm.all_gather((totals, count))
    count = sum(number for _, number in shares)
    losses = {
        name: sum(share.get(name, 0.0) for share, _ in shares) / count for name in shares[0][0]
    }
    losses["total_loss"] = sum(losses.values())
    return losses
