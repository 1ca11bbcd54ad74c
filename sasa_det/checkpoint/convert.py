"""Files of weights alone, for this and other models, from checkpoints of several projects."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config.defaults import default_config
from ..config.keys import CONFIG_ERRORS, explain, flatten
from ..config.load import BUILD_ERRORS, WITHOUT_DATA, explain_build_error, load_config
from ..config.yaml_file import parse_config
from ..errors import CheckpointError, TransferError, UsageError
from .layouts import recognize
from .matching import named_by_ends
from .preprocessing import is_preprocessing, preprocessing_of
from .reading import category_ids_in, check_finite, classes_in, read_checkpoint
from .sources import locate
from .transfer import Report, transfer
from .writing import write_checkpoint

# Which weights of a training state: those of the last step or their moving average.
WEIGHTS = ("raw", "ema")

_SUFFIXES = (".pth", ".safetensors")

# What detectron2 needs beside the weights of other projects to give them their names.
_NAMING = ("__author__", "matching_heuristics")

# What a converted file says of its weights.
_FACTS = ("preprocessing", "config", "config_digest", "classes", "category_ids")


def convert_checkpoint(
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
    ``"config"`` of the source with its SHA-256, ``"config_digest"``. The same source gives the same
    bytes. The source is left as it is, the target is written completely or not at all.

    Args:
        source: a checkpoint of this project or detectron2, of torchvision's or timm's ResNet-50,
            101 or 152, or of the official SAN release, as :func:`~.sources.locate` takes it: the
            name of a config whose weights :mod:`sasa_det.model_zoo` has is one too.
        target: the file to write, which ends in ``.pth`` or ``.safetensors``.
        model: whose backbone is to be filled. By default, that of the config that the source
            holds; if it holds none, all its weights are written as they are.
        weights: "raw", or "ema" for averages in the place of the weights that were averaged.
        prefix: what the names of the network's weights begin with, where those of others do not,
            as "model."; a prefix that all names have is found without.
        allow: shell patterns of weights that may be missing, of another shape or left over, see
            :func:`sasa_det.checkpoint.transfer.transfer`.
        whole: write all weights under their own names, without the parts of wrappers and the
            prefix where the layout of the names is known.
        overwrite: whether ``target`` may exist.

    Returns:
        Report: what became of every weight.

    Raises:
        CheckpointError: if the source cannot be used or does not fit, its weights are not finite
            or not averaged, or the target exists, is the source, has another suffix or cannot be
            written; nothing is written then.
        UsageError: if there is no model for weights that need one, or the source holds a config
            that cannot be parsed.
    """
    target = Path(target)
    if target.suffix not in _SUFFIXES:
        raise CheckpointError(f"the target {target} must end in {' or '.join(_SUFFIXES)}.")
    source = locate(source).path
    if source.exists() and target.exists() and source.samefile(target):
        raise CheckpointError(f"the target {target} is the source.")
    if os.path.lexists(target) and not overwrite:
        raise CheckpointError(f"the target {target} exists; it is replaced with --overwrite only.")
    checkpoint = read_checkpoint(source)
    tensors = checkpoint.pop("model")
    if weights == "ema":
        tensors = {**tensors, **_averages(checkpoint.pop("ema", None), tensors, source)}
    check_finite({"model": tensors}, source)
    try:
        layout = recognize(tensors, prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be used: {error}.") from error
    foreign = layout is not None and layout.foreign
    config = "" if foreign else checkpoint.get("config")
    is_text = isinstance(config, str) and config != ""
    values = parse_config(f"the config in {source}", config) if is_text else {}
    config = config if values else ""
    preprocessing = layout.preprocessing if foreign else checkpoint.get("preprocessing")
    if not is_preprocessing(preprocessing):
        preprocessing = preprocessing_of(values)
    if not whole and model is None:
        if foreign:
            raise UsageError(
                f"{source} holds weights of {layout.owner}: name the config of the model that they "
                "are for with --config-file."
            )
        if allow and not config:
            raise UsageError(
                f"{source} holds no config: --allow takes the config of a model, given with "
                "--config-file."
            )
        whole = not config
        model = _build(_model_config(values, source)) if config else None
    if layout is None and (prefix or not whole):
        raise CheckpointError(
            f"{source}: weights with names like {sorted(tensors)[0]} do not belong to this "
            "project, detectron2, torchvision, timm or the official SAN release; where the network "
            "is a part of something larger, --prefix names what its weights' names begin with."
        )
    rest = [str(key) for key in checkpoint if key not in (*_NAMING, *_FACTS)]

    def completed(report: Report) -> Report:
        dropped = {**report.dropped, **dict.fromkeys(rest, "state of training")}
        return dataclasses.replace(report, dropped=dropped, preprocessing=preprocessing)

    if whole:
        bare = layout.bare(tensors) if layout else {name: name for name in tensors}
        names = {short: name for name, short in bare.items()}
        if len(names) < len(bare):
            raise CheckpointError(f"{source}: some names differ only by the part of a wrapper.")
        left = {name: "outside the prefix" for name in tensors if name not in bare}
        report = completed(Report(names, left))
        facts = {key: checkpoint[key] for key in _NAMING if key in checkpoint}
    else:
        try:
            report = completed(transfer(tensors, layout, model, allow))
        except TransferError as error:
            message = f"{source} does not fit the target: {error}."
            raise TransferError(message, completed(error.report)) from error
        except CheckpointError as error:
            raise CheckpointError(f"{source} does not fit the target: {error}.") from error
        facts = {"matching_heuristics": True}
    if config or not whole:
        digest = hashlib.sha256(config.encode()).hexdigest()
        facts |= {"config": config, "config_digest": digest}
    classes = classes_in(checkpoint)
    if whole and classes:
        # Evaluation compares them with those of the data.
        facts["classes"] = classes
        if ids := category_ids_in(checkpoint):
            facts["category_ids"] = ids
    if preprocessing is not None:
        facts["preprocessing"] = preprocessing
    found = {name: _without_surroundings(tensors[old]) for name, old in report.loaded.items()}
    write_checkpoint({"model": found, **facts}, target)
    return report


def _averages(ema: Any, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    averages = ema.get("weights") if isinstance(ema, dict) else None
    if not isinstance(averages, dict) or not averages:
        raise CheckpointError(
            f"{path} holds no averaged weights, which a run with a decay of averages "
            "(MODEL.EMA.DECAY, or train.ema.decay in a LazyConfig) saves; convert its raw weights."
        )
    if not any(name in weights for name in averages):
        averages = named_by_ends(averages)  # as a classifier's weights are
    for name, average in averages.items():
        weight = weights.get(name)
        if weight is None or not isinstance(average, Tensor) or average.shape != weight.shape:
            raise CheckpointError(f"{path}: the averaged weight {name} is not one of its weights.")
    return averages


def _without_surroundings(weight: Tensor) -> Tensor:
    """Copy a tensor that is a part of a larger storage, all of which would be saved."""
    if weight.untyped_storage().nbytes() <= weight.numel() * weight.element_size():
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


def build_target(config_file: str, opts: Sequence[str] = ()) -> nn.Module:
    """Build the model of a config on the CPU.

    Args:
        config_file: path of a yaml file.
        opts: KEY VALUE pairs.

    Raises:
        UsageError: on a config that cannot be used.
    """
    return _build(load_config(config_file, [*opts, *WITHOUT_DATA]))


def _model_config(values: dict[str, Any], path: Path) -> CfgNode:
    """Make a config of what the one in a checkpoint says about the model."""
    advice = "name the config of the target with --config-file."
    if not isinstance(values.get("MODEL"), dict):
        raise UsageError(f"the config in {path} is not a yaml config with a MODEL; {advice}")
    cfg, values = default_config(), {"MODEL": values["MODEL"]}
    try:
        cfg.merge_from_other_cfg(CfgNode(values))
    except CONFIG_ERRORS as error:
        reason = explain(error, cfg, flatten(values)).rstrip(".")
        raise UsageError(f"the config in {path} cannot be used: {reason}; {advice}") from error
    return cfg


def _build(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    try:
        return build_model(cfg)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error
