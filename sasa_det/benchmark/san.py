"""Cases of SAN: detectors with and without all relations in memory."""

from collections.abc import Callable
from functools import partial
from types import MethodType

from torch import Tensor, nn

from ..engine.model_options import checkpoint_stages
from ..layers import PairwiseAttention2d, PatchwiseAttention2d
from ..layers.projection import project
from ..modeling import use_products
from ..modeling.backbone.san import STAGES
from ..ops.aggregation import aggregate
from .measure import Case, Contender, Settings
from .models import Way, check_size, detection, stock

_ASPECT = 1.68  # of a COCO image at 800 x 1344
_STRIDE = 32
_IN_PYTORCH = ("MODEL.SASA.BACKEND", "reference")
_ATTENTIONAL = ("MODEL.SASA.FPN", "attention", "MODEL.SASA.HEAD", "attention")


def unfold(model: nn.Module) -> nn.Module:
    """Let a model's layers compute their weights from all relations at once, in plain PyTorch."""
    for module in model.modules():
        if isinstance(module, PairwiseAttention2d | PatchwiseAttention2d):
            use_products(module.weights)
            module.forward = MethodType(_unfolded, module)
    return model


def _checkpointed(model: nn.Module) -> nn.Module:
    checkpoint_stages(model.backbone, STAGES)
    return model


def _unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    query, key, value = project(x, (layer.query, layer.key, layer.value))
    weights = layer.window_weights(query, key)
    return aggregate(value, weights, kernel_size=layer.kernel_size)


def _cases(settings: Settings) -> list[Case]:
    check_size(settings, "san", 85)  # up to which P7 of an image is one pixel
    cases = []
    height = settings.image_size
    width = round(height * _ASPECT / _STRIDE) * _STRIDE
    for kind in ("pairwise", "patchwise"):
        plain = (Way("plain PyTorch", kind, stock), _IN_PYTORCH)
        unfolded = Way("all relations at once", kind, unfold)
        built = Way("as built", kind, lambda model: model)
        checkpointed = Way("activation checkpointing", kind, _checkpointed)
        steps = {
            "training step": (plain, (unfolded, ()), (built, ()), (checkpointed, ())),
            # Plain PyTorch would have all relations of the heads too, which are not SAN's.
            "training step, attentional FPN and heads": (
                (unfolded, _ATTENTIONAL),
                (built, _ATTENTIONAL),
            ),
        }
        config = f"COCO-Detection/retinanet_SAN10_{kind}.yaml"
        for step, ways in steps.items():
            contenders = tuple(
                Contender(
                    way.name,
                    partial(detection, settings, config, way, True, (height, width), opts),
                    slow=True,
                )
                for way, opts in ways
            )
            name = f"RetinaNet-SAN10 {kind} {step}"
            title = f"{name}, {settings.batch}x3x{height}x{width}"
            cases.append(Case("san", name, title, contenders, memory=True, waits=True))
    return cases


CASES: dict[str, Callable[[Settings], list[Case]]] = {"san": _cases}
