"""Parameters and FLOPs of a model, part by part, counted as the paper counts them.

A multiply-add is 2 FLOPs; softmax, norms, pooling, activations and biases are free. Models are
traced on torch's meta device, so that a count needs neither weights nor time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN, ResNet, build_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Part", "count_config", "count_resnet", "total"]


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: stem, res2 to res5, linear, FPN or head.
        parameters: number of parameters, frozen ones included, buffers not.
        flops: floating-point operations for one image; None where they depend on its content.
    """

    name: str
    parameters: int
    flops: int | None


def total(parts: list[Part]) -> Part:
    """Add up the parts of a model; its FLOPs are None if those of a part are."""
    flops = [part.flops for part in parts]
    return Part(
        "total", sum(part.parameters for part in parts), None if None in flops else sum(flops)
    )


def count_resnet(model: ResNet, height: int, width: int) -> list[Part]:
    """Count a ResNet, its classifier included if it has one.

    Args:
        model: a detectron2 ResNet, such as a :class:`SASAResNet`; it is moved to the meta device.
        height, width: size of the image in pixels.

    Returns:
        list[Part]: stem, the stages and, if there is one, linear.
    """
    flops, _ = _flops_by_child(model, _image(model.stem.in_channels, height, width))
    return [
        Part(name, _parameters(child), flops.get(name, 0))
        for name, child in model.named_children()
        if _parameters(child)
    ]


def count_config(cfg: CfgNode, height: int, width: int) -> list[Part]:
    """Count the model that a config builds.

    The FLOPs of an R-CNN's heads depend on its proposals and are not counted.

    Args:
        cfg: a config of a model whose backbone is a ResNet or an FPN on one.
        height, width: size of the image in pixels; padded as the backbone asks.

    Returns:
        list[Part]: stem, the stages, FPN and head.

    Raises:
        ValueError: if the backbone is neither a ResNet nor an FPN on one.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval().to("meta")
    backbone = model.backbone
    divisor = max(1, backbone.size_divisibility)
    height, width = (-(-size // divisor) * divisor for size in (height, width))
    resnet = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    if not isinstance(resnet, ResNet):
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} must build a ResNet or an FPN on one, "
            f"it builds {type(backbone).__name__}."
        )
    parts = count_resnet(resnet, height, width)
    flops, features = _flops_by_child(backbone, _image(len(cfg.MODEL.PIXEL_MEAN), height, width))
    if backbone is not resnet:
        fpn_flops = sum(count for name, count in flops.items() if name != "bottom_up")
        parameters = _parameters(backbone) - _parameters(resnet)
        parts.append(Part("FPN", parameters, fpn_flops))
    head_flops = None
    if hasattr(model, "head"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.head([features[name] for name in model.head_in_features])
        head_flops = counter.get_total_flops()
    parts.append(Part("head", _parameters(model) - _parameters(backbone), head_flops))
    return parts


def _image(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.empty(1, channels, height, width, device="meta")


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops_by_child(module: nn.Module, image: torch.Tensor) -> tuple[dict[str, int], Any]:
    module = module.eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module(image)
    counts = counter.get_flop_counts()
    root = type(module).__name__
    names = [name for name, _ in module.named_children()]
    return {name: sum(counts.get(f"{root}.{name}", {}).values()) for name in names}, output
