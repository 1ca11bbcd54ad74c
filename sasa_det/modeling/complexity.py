"""Parameters and FLOPs of a model, part by part, counted as the paper counts them.

A multiply-add is 2 FLOPs; softmax, norms, pooling, activations and biases are free. Models are
built and traced on torch's meta device, so that a count needs neither weights nor time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN, build_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .classifier import Classifier

__all__ = ["Part", "count_config", "total"]


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: a part of the backbone, as stem, res2 to res5 and linear, or FPN or head.
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


def count_config(cfg: CfgNode, height: int, width: int) -> list[Part]:
    """Count the model that a config builds.

    The FLOPs of an R-CNN's heads depend on its proposals and are not counted.

    Args:
        cfg: a config of a model with a backbone.
        height, width: size of the image in pixels; padded as the backbone asks.

    Returns:
        list[Part]: the children of the backbone, or of what its FPN stands on, by their names;
        FPN; and head, or linear for a classifier's own. What a backbone does outside its children
        is called other.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg).eval()
    divisor = max(1, model.backbone.size_divisibility)
    height, width = (-(-size // divisor) * divisor for size in (height, width))
    image = torch.empty(1, len(cfg.MODEL.PIXEL_MEAN), height, width, device="meta")
    parts, features = _count_backbone(model.backbone, image)
    return parts + _count_head(model, features)


def _count_backbone(backbone: nn.Module, image: Tensor) -> tuple[list[Part], dict[str, Tensor]]:
    flops, features = _flops(backbone, image)
    trunk, path = backbone, type(backbone).__name__
    whole = Part("whole", _parameters(backbone), flops[path])
    fpn = []
    if isinstance(backbone, FPN):
        trunk, path = backbone.bottom_up, f"{path}.bottom_up"
        below = Part("below", _parameters(trunk), flops[path])
        fpn = [_difference("FPN", whole, below)]
        whole = below
    parts = [
        Part(name, _parameters(child), flops.get(f"{path}.{name}", 0))
        for name, child in trunk.named_children()
        if _parameters(child)
    ]
    other = _difference("other", whole, total(parts))
    if other.parameters or other.flops:
        parts.append(other)
    return parts + fpn, features


def _count_head(model: nn.Module, features: dict[str, Tensor]) -> list[Part]:
    parameters = _parameters(model) - _parameters(model.backbone)
    if isinstance(model, Classifier):
        if model.linear is None:
            return []
        name, head, inputs = "linear", model.linear, features[model.in_feature].mean(dim=(2, 3))
    elif hasattr(model, "head"):
        name, head = "head", model.head
        inputs = [features[feature] for feature in model.head_in_features]
    else:
        return [Part("head", parameters, None)]
    return [Part(name, parameters, _flops(head, inputs)[0][type(head).__name__])]


def _flops(module: nn.Module, inputs: Any) -> tuple[dict[str, int], Any]:
    """Run a module; return the FLOPs of it and of its descendants by path, and its output."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = module(inputs)
    counts = counter.get_flop_counts()
    return {path: sum(operations.values()) for path, operations in counts.items()}, output


def _difference(name: str, whole: Part, part: Part) -> Part:
    return Part(name, whole.parameters - part.parameters, whole.flops - part.flops)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
