"""Making files of weights alone from checkpoints."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import CheckpointError, TransferError
from .layouts import Layout, recognize
from .preprocessing import is_preprocessing
from .reading import check_finite, read_checkpoint
from .transfer import Report, transfer
from .writing import write_checkpoint

__all__ = [
    "WEIGHTS",
    "Contents",
    "check_target",
    "convert",
    "preprocessing_in",
    "read_contents",
    "write_backbone",
]

# Which weights of a training state: those of the last step or their moving average.
WEIGHTS = ("raw", "ema")

_SUFFIXES = (".pth", ".safetensors")
# What detectron2 needs beside the weights of other projects to give them their names.
_NAMING = ("__author__", "matching_heuristics")
# What a backbone's file tells of its weights.
_FACTS = ("preprocessing", "config", "config_digest")


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        path: the file.
        weights: by name.
        rest: all else.
        layout: of the names, None if it is unknown.
    """

    path: Path
    weights: dict[str, Tensor]
    rest: dict[str, Any]
    layout: Layout | None


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    weights: str = "raw",
    prefix: str = "",
    preprocessing: dict[str, Any] | None = None,
    config: str = "",
    overwrite: bool = False,
) -> Report:
    """Write the weights of a checkpoint, without the state of its training, to another file.

    The same source gives the same bytes. The source is left as it is, the target is written whole
    or not at all.

    Args:
        source: a file that :func:`read_checkpoint` accepts.
        target: the file to write, which ends in ``.pth`` or ``.safetensors``.
        weights: "raw", or "ema" for averages in the place of the weights that were averaged.
        prefix: see :func:`read_contents`.
        preprocessing, config: what the file shall tell of the weights, as of
            :func:`write_backbone`. Of a source that was converted already, what it tells is kept.
        overwrite: whether ``target`` may exist.

    Returns:
        Report: all weights are loaded under their own names, which are those without the parts of
        wrappers and the prefix, where the layout of the names is known.

    Raises:
        CheckpointError: if the source cannot be used, its weights are not finite or not averaged,
            or the target exists, is the source, has another suffix or cannot be written.
    """
    check_target(source, target, overwrite=overwrite)
    contents = read_contents(source, weights, prefix)
    rest = contents.rest
    # A file that was converted already is copied.
    kept = (*_NAMING, *_FACTS) if "config_digest" in rest else _NAMING
    facts = {key: rest[key] for key in kept if key in rest}
    if config and "config_digest" not in rest:
        facts |= _facts(preprocessing, config)
    found = contents.weights
    bare = contents.layout.bare(found) if contents.layout else {name: name for name in found}
    names = {short: name for name, short in bare.items()}
    if len(names) < len(bare):
        raise CheckpointError(f"{contents.path}: some names differ by the part of a wrapper alone.")
    moved = {short: found[name] for short, name in names.items()}
    write_checkpoint({"model": moved, **facts}, target)
    dropped = {name: "outside the prefix" for name in found if name not in bare}
    dropped |= _state_of_training(rest)
    return Report(names, dropped, preprocessing=preprocessing_in(facts))


def preprocessing_in(rest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the preprocessing that a converted file tells of."""
    preprocessing = rest.get("preprocessing")
    return preprocessing if is_preprocessing(preprocessing) else None


def check_target(
    source: str | os.PathLike, target: str | os.PathLike, *, overwrite: bool = False
) -> None:
    """Check that a file may be written, as :func:`convert` demands it, before any work is done."""
    source, target = Path(source), Path(target)
    if target.suffix not in _SUFFIXES:
        raise CheckpointError(f"the target {target} must end in {' or '.join(_SUFFIXES)}.")
    if target.resolve() == source.resolve() or _is_same_file(source, target):
        raise CheckpointError(f"the target {target} is the source.")
    if os.path.lexists(target) and not overwrite:
        raise CheckpointError(f"the target {target} exists; it is replaced with --overwrite only.")


def read_contents(source: str | os.PathLike, weights: str = "raw", prefix: str = "") -> Contents:
    """Read what is to be converted.

    Args:
        source: a file that :func:`read_checkpoint` accepts.
        weights: as of :func:`convert`.
        prefix: what the names of the network's weights begin with, where those of others do not,
            as "model."; what all names begin with is found without.

    Raises:
        CheckpointError: as of :func:`convert`.
    """
    path = Path(source)
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.pop("model")
    if weights == "ema":
        tensors = {**tensors, **_averages(checkpoint.pop("ema", None), tensors, path)}
    check_finite(tensors, path)
    tensors = {name: _without_surroundings(tensor) for name, tensor in tensors.items()}
    try:
        layout = recognize(tensors, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.") from error
    if layout is None and prefix:
        raise _unknown(path, tensors)
    return Contents(path, tensors, checkpoint, layout)


def write_backbone(
    contents: Contents,
    target: str | os.PathLike,
    model: nn.Module,
    *,
    preprocessing: dict[str, Any] | None = None,
    config: str = "",
    allow: Sequence[str] = (),
) -> Report:
    """Write what a checkpoint holds for the backbone of a model, for any model with that backbone.

    Args:
        contents: of the checkpoint.
        target: the file to write.
        model: tells names and shapes; see :func:`transfer`.
        preprocessing: ``"format"``, ``"pixel_mean"`` and ``"pixel_std"`` of the images that the
            weights were trained on; None if unknown.
        config: that they were trained with, in yaml; "" if unknown.
        allow: see :func:`transfer`.

    Returns:
        Report: of all weights, and of what else the checkpoint holds.

    Raises:
        CheckpointError: if the weights do not fit or the target cannot be written.
    """
    path, weights, rest, layout = contents
    if layout is None:
        raise _unknown(path, weights)
    try:
        report = transfer(weights, layout, model, allow)
    except TransferError as error:
        report = _completed(error.report, rest, preprocessing)
        raise TransferError(f"{path} does not fit the target: {error}.", report) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit the target: {error}.") from error
    facts = {"matching_heuristics": True, **_facts(preprocessing, config)}
    moved = {name: weights[source] for name, source in report.loaded.items()}
    write_checkpoint({"model": moved, **facts}, target)
    return _completed(report, rest, preprocessing)


def _unknown(path: Path, weights: dict[str, Tensor]) -> CheckpointError:
    return CheckpointError(
        f"{path}: weights named as {sorted(weights)[0]} are none of this project, detectron2, "
        "torchvision, timm or the official SAN release; where the network is a part of something "
        "larger, --prefix names what its weights' names begin with."
    )


def _facts(preprocessing: dict[str, Any] | None, config: str) -> dict[str, Any]:
    digest = hashlib.sha256(config.encode()).hexdigest()
    facts: dict[str, Any] = {"config": config, "config_digest": digest}
    if preprocessing is not None:
        facts["preprocessing"] = preprocessing
    return facts


def _completed(
    report: Report, rest: dict[str, Any], preprocessing: dict[str, Any] | None
) -> Report:
    dropped = {**report.dropped, **_state_of_training(rest)}
    return dataclasses.replace(report, dropped=dropped, preprocessing=preprocessing)


def _state_of_training(rest: dict[str, Any]) -> dict[str, str]:
    return {str(key): "state of training" for key in rest if key not in (*_NAMING, *_FACTS)}


def _averages(ema: Any, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    averages = ema.get("weights") if isinstance(ema, dict) else None
    if not isinstance(averages, dict) or not averages:
        raise CheckpointError(
            f"{path} holds no averaged weights, which a run with MODEL.EMA.DECAY has; convert its "
            "raw ones."
        )
    for name, average in averages.items():
        weight = weights.get(name)
        if weight is None or not isinstance(average, Tensor) or average.shape != weight.shape:
            raise CheckpointError(f"{path}: the averaged weight {name} is none of its weights.")
    return averages


def _is_same_file(source: Path, target: Path) -> bool:
    return source.exists() and target.exists() and source.samefile(target)


def _without_surroundings(weight: Tensor) -> Tensor:
    """Copy a tensor that is a part of a larger storage, all of which would be saved."""
    if weight.untyped_storage().nbytes() <= weight.numel() * weight.element_size():
        return weight
    return weight.clone(memory_format=torch.contiguous_format)
