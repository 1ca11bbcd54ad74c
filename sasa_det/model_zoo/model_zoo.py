"""The functions of detectron2's model_zoo for the configs of this project."""

from pathlib import PurePosixPath

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..checkpoint import Checkpointer
from ..config.load import load_config
from ..config_files import CONFIGS, config_names
from ..errors import nearest
from .checkpoints import CHECKPOINTS, Weights


def get_config_file(config_path: str) -> str:
    """Return the path of a config file of this project.

    Args:
        config_path: name of the file in the project's folder of configs, such as
            "COCO-Detection/retinanet_SASA_R_50_full.yaml".

    Raises:
        RuntimeError: if there is no such file.
    """
    names = config_names()
    if config_path not in names:
        raise RuntimeError(
            f"{config_path} is not a config of sasa_det.model_zoo{nearest(config_path, names)}"
        )
    return str(CONFIGS / config_path)


def get_checkpoint_url(config_path: str) -> str:
    """Return where the weights are that were trained with a config.

    Args:
        config_path: as for :func:`get_config_file`.

    Returns:
        str: what ``MODEL.WEIGHTS`` and ``train.init_checkpoint`` take: an address or the path of a
        file of this package, and ``#sha256=`` with the file's SHA-256, which is checked when the
        weights are read.

    Raises:
        RuntimeError: if there are none.
    """
    return _weights_of(config_path).address


def get_sample_images(config_path: str) -> list[str]:
    """Return the images that this package has to try the weights of a config on.

    Args:
        config_path: as for :func:`get_config_file`.

    Returns:
        list[str]: paths, none if the weights come without images.

    Raises:
        RuntimeError: as of :func:`get_checkpoint_url`.
    """
    return _weights_of(config_path).sample_images


def _weights_of(config_path: str) -> Weights:
    weights = CHECKPOINTS.get(str(PurePosixPath(config_path).with_suffix("")))
    if weights is None:
        known = ", ".join(f"{name}.yaml" for name in CHECKPOINTS)
        raise RuntimeError(
            f"there are no trained weights of {config_path} in sasa_det.model_zoo; it has those of "
            f"these configs: {known}."
        )
    return weights


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """Return a config of this project, which can be changed.

    Args:
        config_path: as for :func:`get_config_file`; a LazyConfig, which ends in .py, is executed,
            and may be a part of one, such as "Common/train.py".
        trained: whether the weights of the config are those that were trained with it, as
            :func:`get_checkpoint_url` names them, instead of the ones that the config starts from.

    Raises:
        RuntimeError: if there is no such config, or there are no such weights.
    """
    file = get_config_file(config_path)
    weights = get_checkpoint_url(config_path) if trained else None
    if file.endswith(".py"):
        cfg = LazyConfig.load(file)
        if weights:
            cfg.train.init_checkpoint = weights
        return cfg
    cfg = load_config(file).clone()
    cfg.defrost()
    if weights:
        cfg.MODEL.WEIGHTS = weights
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build the model of a config of this project and load the weights that the config names.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: as for :func:`get_config`.
        device: of the model; by default the config's or, where there is no GPU, "cpu".

    Returns:
        nn.Module: in training mode.

    Raises:
        RuntimeError: as of :func:`get_config`.
        CheckpointError: if the weights cannot be read, have another SHA-256, or do not fit.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model = instantiate(cfg.model).to(device or cfg.train.device)
        weights = cfg.train.init_checkpoint
    Checkpointer(model, strict=trained).load(weights)
    return model
