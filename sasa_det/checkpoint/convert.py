"""Files of weights alone, for this and other models, from checkpoints of several projects."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import add_sasa_config
from ..config.keys import CONFIG_ERRORS, explain, flatten
from ..config.load import BUILD_ERRORS, explain_build_error, load_config
from ..config.yaml_file import parse_config
from ..errors import CheckpointError, TransferError, UsageError
from .layouts import Layout, recognize
from .preprocessing import is_preprocessing, preprocessing_of
from .reading import check_finite, read_checkpoint
from .transfer import Report, transfer
from .writing import write_checkpoint

__all__ = [
    "Contents",
    "WEIGHTS",
    "build_target",
    "check_target",
    "convert",
    "convert_backbone",
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


# Data are not needed, and need not be there.
_NO_DATA = {
    "DATASETS.TRAIN_JSON": "",
    "DATASETS.TRAIN_IMAGES": "",
    "DATASETS.TEST_JSON": "",
    "DATASETS.TEST_IMAGES": "",
    "DATASETS.IMAGE_FOLDER": "",
    "DATASETS.HOLDOUT": "0.0",
}


def convert_backbone(
    source: str | os.PathLike,
    target: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    weights: str = "raw",
    prefix: str = "",
    allow: Sequence[str] = (),
    whole: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write the weights of a checkpoint's backbone to a file that any model with it can start from.

    The file holds weights under the names of the backbone alone, with ``"matching_heuristics"``,
    by which detectron2 finds their place, ``"preprocessing"`` where it is known, and the
    ``"config"`` of the source with its SHA-256, ``"config_digest"``. It is as deterministic, whole
    and apart from the source as that of :func:`sasa_det.checkpoint.convert`.

    Args:
        source: a checkpoint of this project or detectron2, of torchvision's or timm's ResNet-50,
            101 or 152, or of the official SAN release.
        target: the file to write, which ends in ``.pth`` or ``.safetensors``.
        model: whose backbone is to be filled. By default, that of the config that the source
            holds; if it holds none, all its weights are written as they are.
        weights: "raw", or "ema" for averages in the place of the weights that were averaged.
        prefix: see :func:`sasa_det.checkpoint.convert.read_contents`.
        allow: shell patterns of weights that may be missing, of another shape or left over, see
            :func:`sasa_det.checkpoint.transfer.transfer`.
        whole: write all weights as they are, under their own names.
        overwrite: whether ``target`` may exist.

    Returns:
        Report: what became of every weight.

    Raises:
        CheckpointError: if the source cannot be used or does not fit, or the target cannot be
            written; nothing is written then.
        UsageError: if there is no model for weights that need one.
    """
    check_target(source, target, overwrite=overwrite)
    contents = read_contents(source, weights, prefix)
    layout = contents.layout
    foreign = layout is not None and layout.foreign
    config = contents.rest.get("config", "")
    if foreign or not isinstance(config, str):
        config = ""
    values = parse_config(f"the config in {source}", config) if config else {}
    preprocessing = layout.preprocessing if foreign else preprocessing_in(contents.rest)
    facts = {"preprocessing": preprocessing or preprocessing_of(values), "config": config}
    options = {"weights": weights, "prefix": prefix, "overwrite": overwrite}
    if whole:
        return convert(source, target, **options, **facts)
    if model is None:
        if foreign:
            raise UsageError(
                f"{source} holds weights of {layout.owner}: name the config of the model that they "
                "are for with --config-file."
            )
        if not values:
            if allow:
                raise UsageError(
                    f"{source} holds no config: --allow takes the config of a model, given with "
                    "--config-file."
                )
            return convert(source, target, **options)
        model = _build(_model_config(values, source))
    return write_backbone(contents, target, model, **facts, allow=allow)


def build_target(config_file: str, opts: Sequence[str] = ()) -> nn.Module:
    """Build the model of a config on the CPU.

    Args:
        config_file: path of a yaml file.
        opts: KEY VALUE pairs.

    Raises:
        UsageError: on a config that cannot be used.
    """
    no_data = [word for pair in _NO_DATA.items() for word in pair]
    return _build(load_config(config_file, [*opts, *no_data]))


def _model_config(values: dict[str, Any], source: str | os.PathLike) -> CfgNode:
    """Make a config of what one in a checkpoint says of the model."""
    advice = "name the config of the target with --config-file."
    if not isinstance(values.get("MODEL"), dict):
        raise UsageError(f"the config in {source} is no yaml config with a MODEL; {advice}")
    cfg = get_cfg()
    add_sasa_config(cfg)
    values = {"MODEL": values["MODEL"]}
    try:
        cfg.merge_from_other_cfg(CfgNode(values))
    except CONFIG_ERRORS as error:
        reason = explain(error, cfg, flatten(values)).rstrip(".")
        raise UsageError(f"the config in {source} cannot be used: {reason}; {advice}") from error
    return cfg


def _build(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        return build_model(cfg)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
