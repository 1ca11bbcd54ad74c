"""Options that change a model after it was built: memory, memory format, compilation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..config.options import RunOptions
from ..errors import UsageError
from ..layers.replay import replayed
from ..modeling.backbone.san import SANStage


def apply_options(model: nn.Module, options: RunOptions) -> nn.Module:
    """Apply ``MODEL.BN_DECAY``, ``MODEL.CHANNELS_LAST`` and the like to a model.

    Args:
        model: the model, which is changed in place.
        options: of the run's config.

    Returns:
        nn.Module: the model.

    Raises:
        UsageError: if the backbone has no stage of a given name.
    """
    try:
        checkpoint_stages(model.backbone, options.activation_checkpointing)
    except ValueError as error:
        raise UsageError(f"{options.key('activation_checkpointing')}: {error}") from error
    if options.bn_decay:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 1 - options.bn_decay
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.compile:
        compile_parts(model)
    return model


def checkpoint_stages(backbone: nn.Module, stages: Sequence[str]) -> None:
    """Compute stages of a backbone again in the backward pass instead of storing activations.

    The results and the statistics of batch norms do not change. Stages of a SAN keep small results
    where :meth:`SANStage.can_replay` says so, and their second run takes less time.

    Args:
        backbone: a backbone or, with ``bottom_up``, a feature pyramid on one; changed in place.
        stages: names of modules of the backbone, as in "res4".

    Raises:
        ValueError: if the backbone has no such stage.
    """
    backbone = getattr(backbone, "bottom_up", backbone)
    for name in stages:
        stage = getattr(backbone, name, None)
        if not isinstance(stage, nn.Module):
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ValueError(f"each stage must be one of {known}, got {name}.")
        stage.forward = partial(_checkpointed, stage, stage.forward)


def _checkpointed(stage: nn.Module, forward, *args):
    if not (stage.training and torch.is_grad_enabled()):
        return forward(*args)
    if isinstance(stage, SANStage) and stage.can_replay(*args):
        return replayed(forward, *args, lambda: list(stage.parameters()))
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _kept_statistics(stage)),
    )


@contextmanager
def _kept_statistics(stage: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch norms after the second forward pass."""
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def compile_parts(model: nn.Module) -> None:
    """Compile the backbone and the heads in place; the names in the state dict do not change.

    The code between them depends on the number of boxes and is not compiled.
    """
    for name in ("backbone", "head", "proposal_generator", "roi_heads"):
        part = getattr(model, name, None)
        if part is not None:
            part.compile()
