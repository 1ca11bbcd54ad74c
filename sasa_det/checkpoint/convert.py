"""Making files of weights alone from checkpoints."""

import os
from pathlib import Path

import torch

from .errors import CheckpointError
from .reading import check_finite, read_checkpoint
from .writing import write_checkpoint

__all__ = ["convert"]

# What detectron2 needs beside the weights of other projects to give them their names.
_KEPT = ("model", "__author__", "matching_heuristics")


def convert(
    source: str | os.PathLike, target: str | os.PathLike, *, overwrite: bool = False
) -> None:
    """Write the weights of a checkpoint, without the state of its training, to another file.

    The same source gives the same bytes. The source is left as it is, the target is written whole
    or not at all.

    Args:
        source: a file that :func:`read_checkpoint` accepts.
        target: the file to write, which ends in ``.pth``.
        overwrite: whether ``target`` may exist.

    Raises:
        CheckpointError: if the source cannot be used, its weights are not finite, or the target
            exists, is the source, has another suffix or cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".pth":
        raise CheckpointError(f"the target {target} must end in .pth.")
    if target.resolve() == source.resolve() or _is_same_file(source, target):
        raise CheckpointError(f"the target {target} is the source.")
    if os.path.lexists(target) and not overwrite:
        raise CheckpointError(f"the target {target} exists; it is replaced with --overwrite only.")
    checkpoint = read_checkpoint(source)
    check_finite(checkpoint["model"], source)
    weights = checkpoint["model"]
    for key, weight in weights.items():
        weights[key] = _without_surroundings(weight)
    write_checkpoint({key: checkpoint[key] for key in _KEPT if key in checkpoint}, target)


def _is_same_file(source: Path, target: Path) -> bool:
    return source.exists() and target.exists() and source.samefile(target)


def _without_surroundings(weight: torch.Tensor) -> torch.Tensor:
    """Copy a tensor that is a part of a larger storage, all of which would be saved."""
    if weight.untyped_storage().nbytes() <= weight.numel() * weight.element_size():
        return weight
    return weight.clone(memory_format=torch.contiguous_format)
