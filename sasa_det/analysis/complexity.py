"""What the parts of a model cost: parameters and FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FPN, build_model
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config.load import BUILD_ERRORS, explain_build_error
from ..errors import UsageError
from ..modeling.classifier import Classifier


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


def count_config(
    cfg: CfgNode, height: int, width: int, costs: Mapping[Any, Callable[..., int]] | None = None
) -> list[Part]:
    """Count the model that a config builds.

    The FLOPs of an R-CNN's heads depend on its proposals and are not counted.

    Args:
        cfg: a config of a model with a backbone.
        height, width: size of the image in pixels; padded as the backbone asks.
        costs: functions of shapes that return what an operator costs, as ``custom_mapping`` of
            :class:`torch.utils.flop_counter.FlopCounterMode`, for another count than FLOPs.

    Returns:
        list[Part]: the children of the backbone, or of what its FPN stands on, by their names;
        FPN; and head, or linear for a classifier's own. What a backbone does outside its children
        is called other.

    Raises:
        UsageError: if the model cannot be built or run.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            model = build_model(cfg).eval()
        divisor = max(1, model.backbone.size_divisibility)
        height, width = (-(-size // divisor) * divisor for size in (height, width))
        image = torch.empty(1, len(cfg.MODEL.PIXEL_MEAN), height, width, device="meta")
        parts, features = _count_backbone(model.backbone, image, costs)
        return parts + _count_head(model, features, costs)
    except BUILD_ERRORS as error:
        raise UsageError(explain_build_error(error)) from error


def _count_backbone(
    backbone: nn.Module, image: Tensor, costs: Mapping | None
) -> tuple[list[Part], dict[str, Tensor]]:
    flops, features = _flops(backbone, image, costs)
    trunk, path = backbone, type(backbone).__name__
    if isinstance(backbone, FPN):
        trunk, path = backbone.bottom_up, f"{path}.bottom_up"
    parts = [
        Part(name, _parameters(child), flops.get(f"{path}.{name}", 0))
        for name, child in trunk.named_children()
        if _parameters(child)
    ]
    whole = _parameters(trunk), flops[path]
    other = _rest("other", whole, parts)
    if other.parameters or other.flops:
        parts.append(other)
    if trunk is not backbone:
        whole = _parameters(backbone), flops[type(backbone).__name__]
        parts.append(_rest("FPN", whole, parts))
    return parts, features


def _count_head(model: nn.Module, features: dict[str, Tensor], costs: Mapping | None) -> list[Part]:
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
    return [Part(name, parameters, _flops(head, inputs, costs)[0][type(head).__name__])]


def _flops(module: nn.Module, inputs: Any, costs: Mapping | None) -> tuple[dict[str, int], Any]:
    """Run a module; return the FLOPs of it and of its descendants by path, and its output."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(costs or {}))
    with counter, torch.no_grad():
        output = module(inputs)
    counts = counter.get_flop_counts()
    return {path: sum(operations.values()) for path, operations in counts.items()}, output


def _rest(name: str, whole: tuple[int, int], parts: list[Part]) -> Part:
    counted = total(parts)
    return Part(name, whole[0] - counted.parameters, whole[1] - counted.flops)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def default_image_size(cfg: CfgNode) -> tuple[int, int]:
    """Return height and width of the images that a config's model is counted on by default."""
    is_classifier = cfg.MODEL.META_ARCHITECTURE == "Classifier"
    # The paper counts detectors on images of 640 x 640.
    side = cfg.INPUT.CLASSIFICATION.CROP_SIZE if is_classifier else 640
    return side, side


def parts_report(parts: list[Part], height: int, width: int) -> str:
    """Tabulate the parts of a model and their sum.

    Args:
        parts: from :func:`count_config`.
        height, width: size of the image they were counted on, in pixels.

    Returns:
        str: a table in Markdown.
    """
    rows = []
    for part in (*parts, total(parts)):
        flops = "not counted" if part.flops is None else f"{part.flops / 1e9:.2f}"
        rows.append((part.name, f"{part.parameters / 1e6:.2f}", flops))
    title = f"One image of {height} x {width}; a multiply-add is 2 FLOPs."
    return f"{title}\n\n{markdown(rows, ['part', 'params (M)', 'FLOPs (B)'])}"


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Tabulate texts in Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
