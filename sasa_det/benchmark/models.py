"""Cases of backbones and detectors, which need detectron2."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MethodType

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, CycleBatchNormList, ShapeSpec
from detectron2.modeling import RetinaNet, build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..analysis.complexity import count_config, total
from ..config.defaults import default_config
from ..config.read_keys import mark_read
from ..engine.optimizer import build_optimizer
from ..errors import UsageError
from ..modeling import fuse, use_products
from ..modeling.level_norm import LevelBatchNorm
from ..modeling.pointwise import NormedPointwiseConv2d, PointwiseConv2d
from .measure import Case, Contender, Run, Settings, cases_of_passes
from .operators import module_contender
from .peak import of_pass

_CONVOLUTIONAL, _ATTENTIONAL = "convolutional", "attentional"
_TUNED = "convolutional, tuned"
_CONV_STEM = "attentional, convolutional stem"
_RETINANET_50 = {
    _CONVOLUTIONAL: "COCO-Detection/retinanet_R_50.yaml",
    _ATTENTIONAL: "COCO-Detection/retinanet_SASA_R_50_full.yaml",
}
_DIGITS = {
    _CONVOLUTIONAL: "Digits/retinanet_conv.yaml",
    _ATTENTIONAL: "Digits/retinanet_SASA.yaml",
    _CONV_STEM: "Digits/retinanet_SASA_conv_stem.yaml",
}
_DIGITS_BATCH, _DIGITS_SIZE = 8, 128  # those of the demo


def stock(model: nn.Module) -> nn.Module:
    """Give a model's 1x1 convolutions back to PyTorch, and losses and norms to detectron2."""
    for module in model.modules():
        if isinstance(module, RetinaNet):
            module.losses = MethodType(RetinaNet.losses, module)
        if type(module) is PointwiseConv2d:
            module.__class__ = nn.Conv2d
        elif type(module) is NormedPointwiseConv2d:
            module.__class__ = Conv2d
        elif type(module) is LevelBatchNorm:
            module.__class__ = CycleBatchNormList
    return model


def _fused(model: nn.Module) -> nn.Module:
    return use_products(fuse(model))


def _as_built(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Way:
    """A way to run the model of a config.

    Attributes:
        name: of the contender.
        kind: key of its config.
        prepare: what is done with the model before it runs.
        rival: see :class:`Contender`.
        dtype: see :class:`Contender`.
    """

    name: str
    kind: str
    prepare: Callable[[nn.Module], nn.Module]
    rival: str | None = _TUNED
    dtype: torch.dtype | None = None


def _ways(training: bool, bfloat16: bool) -> list[Way]:
    """Return the ways to run twins, that of detectron2 as it is first.

    Models of this project have its products and its focal loss as they are built.
    """
    ways = [
        Way(_CONVOLUTIONAL, _CONVOLUTIONAL, stock),
        Way(_TUNED, _CONVOLUTIONAL, use_products if training else _fused),
        Way(_ATTENTIONAL, _ATTENTIONAL, _as_built),
    ]
    if not training:
        ways.append(Way(f"{_ATTENTIONAL}, fused", _ATTENTIONAL, _fused))
    if bfloat16:
        rival = f"{_CONVOLUTIONAL}, bfloat16"
        for kind, prepare in ((_CONVOLUTIONAL, stock), (_ATTENTIONAL, _as_built)):
            ways.append(Way(f"{kind}, bfloat16", kind, prepare, rival, torch.bfloat16))
    return ways


def twin_config(settings: Settings, name: str) -> CfgNode:
    """Return a config of the project for models that are compared, with norms that are trained."""
    cfg = default_config()
    cfg.merge_from_file(str(settings.configs / name))
    cfg.MODEL.DEVICE = settings.device
    cfg.MODEL.WEIGHTS = ""
    # Norms that one process trains, on a CPU as well.
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.SOLVER.BASE_LR = 0.0  # every step is the first one
    return cfg


class _Last(nn.Module):
    """A backbone's last feature map."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return list(self.backbone(x).values())[-1]


def check_size(settings: Settings, group: str, largest: int) -> None:
    """Refuse images of which the last feature map is one pixel: its norms could not be trained."""
    if settings.batch == 1 and settings.image_size <= largest:
        raise UsageError(
            f"--cases {group} needs --image-size above {largest} with --batch 1, for its norms, "
            f"got {settings.image_size}."
        )


def _backbone_cases(settings: Settings) -> list[Case]:
    check_size(settings, "backbone", 32)
    size = settings.image_size

    def build(kind: str) -> nn.Module:
        cfg = twin_config(settings, _RETINANET_50[kind])
        return _Last(build_backbone(cfg, ShapeSpec(channels=3)).bottom_up)

    def contender(way: Way, training: bool) -> Contender:
        return module_contender(
            *(settings, way.name, lambda: way.prepare(build(way.kind)), 3, size, training),
            counted=partial(build, way.kind),
            rival=way.rival,
        )

    def contenders(training: bool) -> list[Contender]:
        return [contender(way, training) for way in _ways(training, bfloat16=False)]

    title = f"ResNet-50, {{}}, {settings.batch}x3x{size}x{size}"
    return cases_of_passes("backbone", "backbone", title, contenders)


def _retinanet_cases(settings: Settings) -> list[Case]:
    check_size(settings, "retinanet", 128)
    return _detector_cases(settings, "retinanet", "RetinaNet-50", _RETINANET_50)


def _digits_cases(settings: Settings) -> list[Case]:
    """The models and the batch of the demo, whatever the size of other cases."""
    settings = replace(settings, batch=_DIGITS_BATCH, image_size=_DIGITS_SIZE, bfloat16=False)
    return _detector_cases(settings, "digits", "digits RetinaNet", _DIGITS)


def _detector_cases(
    settings: Settings, group: str, name: str, configs: Mapping[str, str]
) -> list[Case]:
    size = settings.image_size

    def ways(training: bool) -> list[Way]:
        others = [kind for kind in configs if kind not in (_CONVOLUTIONAL, _ATTENTIONAL)]
        own = [Way(kind, kind, _as_built) for kind in others]
        return _ways(training, settings.bfloat16) + own

    def contenders(training: bool) -> list[Contender]:
        return [
            Contender(
                way.name,
                partial(detection, settings, configs[way.kind], way, training),
                rival=way.rival,
                flops=partial(_detector_flops, settings, configs[way.kind], training),
                dtype=way.dtype,
            )
            for way in ways(training)
        ]

    title = f"{name}, {{}}, {settings.batch}x3x{size}x{size}"
    passes = {"inference": False, "training step": True}
    return cases_of_passes(group, name, title, contenders, passes, waits=True)


def _detector_flops(settings: Settings, config: str, training: bool) -> int:
    return of_pass(settings.batch * _image_flops(settings, config), training)


@cache
def _image_flops(settings: Settings, config: str) -> int:
    """Count a detector without what follows its head, as the loss and the choice of boxes."""
    size = settings.image_size
    return total(count_config(twin_config(settings, config), size, size)).flops


def detection(
    settings: Settings,
    config: str,
    way: Way,
    training: bool,
    size: tuple[int, int] | None = None,
    opts: Sequence[str] = (),
) -> Run:
    """Return a step or an inference of a detector.

    Args:
        settings: of the run.
        config: name of the detector's config.
        way: to run it.
        training: whether it is a step.
        size: height and width of the images; squares of ``settings.image_size`` if None.
        opts: overrides of the config, KEY VALUE pairs.
    """
    cfg = twin_config(settings, config)
    cfg.merge_from_list(list(opts))
    model = build_model(cfg).to(memory_format=settings.layout)
    inputs = _detection_inputs(settings, size or (settings.image_size,) * 2)
    dtype = way.dtype or (None if settings.dtype == torch.float32 else settings.dtype)
    if not training:
        model = way.prepare(model.eval())

        def infer():
            with torch.no_grad(), settings.autocast(dtype):
                return model(inputs)

        return infer
    mark_read("*")  # of a recipe, the step alone is measured
    model = way.prepare(model.train())
    optimizer = build_optimizer(cfg, model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        # RetinaNet's losses report to a storage.
        with EventStorage(), settings.autocast(dtype):
            losses = model(inputs)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def _detection_inputs(settings: Settings, size: tuple[int, int]) -> list[dict]:
    """Noise with five boxes an image."""
    shorter = min(size)
    inputs = []
    for _ in range(settings.batch):
        corner = torch.rand(5, 2) * shorter / 2
        boxes = torch.cat([corner, corner + shorter / 8 + torch.rand(5, 2) * shorter / 4], 1)
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.arange(5))
        inputs.append({"image": torch.rand(3, *size) * 255, "instances": instances})
    return inputs


CASES: dict[str, Callable[[Settings], list[Case]]] = {
    "backbone": _backbone_cases,
    "retinanet": _retinanet_cases,
    "digits": _digits_cases,
}
