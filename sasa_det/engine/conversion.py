"""Backbone weights for any model from the checkpoints of this project and of others."""

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.convert import (
    check_target,
    convert,
    preprocessing_in,
    read_contents,
    write_backbone,
)
from ..checkpoint.transfer import Report
from ..config import add_sasa_config
from .config_file import parse_config
from .config_keys import CONFIG_ERRORS, explain, flatten
from .errors import UsageError
from .model_check import BUILD_ERRORS, explain_build_error
from .preprocessing import preprocessing_of
from .setup import load_config

__all__ = ["build_target", "convert_backbone"]

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
