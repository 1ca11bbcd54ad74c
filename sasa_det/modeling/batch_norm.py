"""Batch norms that are left with one value per channel, which PyTorch refuses to normalize."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backbone.training_warnings import WarnsInTraining

_PYTORCH = "Expected more than 1 value per channel"


class SingleValueError(ValueError):
    """A batch norm in training had one value per channel."""


@contextmanager
def naming_batch_norms(model: nn.Module) -> Iterator[None]:
    """Name the batch norm of a model that has one value per channel in a block.

    Args:
        model: runs in the block, in training mode.

    Raises:
        SingleValueError: in place of PyTorch's ValueError, which names nothing.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_PYTORCH):
            raise
        known = {module: name for name, module in model.named_modules()}
        names = [known[o] for o in _callers(error.__traceback__) if isinstance(o, _BatchNorm)]
        name = names[-1] if names else "a batch norm"
        raise SingleValueError(
            f"{name} is a batch norm that has one value per channel, since the batch of a process "
            "is one image and its map there is 1 x 1 pixel: train on at least two images at once "
            "in each process, on larger images, or with another norm, such as GN or FrozenBN."
        ) from error


def check_batch_norms(model: nn.Module, batch_size: int, side: int) -> None:
    """Check that a model can be trained on batches of square images of one size.

    Its backbone and, of a dense detector, its head run on PyTorch's meta device.

    Args:
        model: a classifier or detector; it stays as it is.
        batch_size: images that go through the model at once.
        side: of the images in pixels.

    Raises:
        SingleValueError: as :func:`naming_batch_norms`.
    """
    model = copy.deepcopy(model).to("meta")
    for module in model.modules():
        if isinstance(module, WarnsInTraining):
            module.recipe_keys = ()  # this is not yet its training
    model.train()
    divisor = max(1, model.backbone.size_divisibility)
    side = -(-side // divisor) * divisor
    image = torch.empty(batch_size, len(model.pixel_mean), side, side, device="meta")
    with naming_batch_norms(model):
        features = model.backbone(image)
        if hasattr(model, "head_in_features"):
            model.head([features[name] for name in model.head_in_features])


def _callers(traceback: TracebackType | None) -> Iterator[object]:
    """List the objects whose methods an exception went through, the outermost first."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals.get("self")
        traceback = traceback.tb_next
