"""What is measured: each case sets ways to do one thing side by side."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config.defaults import default_config
from ..layers import AttentionStem, LocalSelfAttention2d
from ..ops import local_attention
from . import others
from .measure import Case, Contender, Run, Settings
from .training import trainer_cases

ATTENTION = "attention"
CONVOLUTION = "3x3 convolution"


def _passes(
    settings: Settings, build: Callable[[], nn.Module], channels: int, size: int, training: bool
) -> Run:
    """Forward or, in training, forward and backward with gradients of weights and input."""
    module, x = settings.place(build()), settings.features(channels, size)
    if not training:
        module.eval()

        def infer():
            with torch.no_grad():
                return module(x)

        return infer
    module.train()
    x.requires_grad_()
    grad = torch.randn_like(module(x))

    def run():
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad)

    return run


_HEADS = 8


def _tensors(settings: Settings, channels: int, size: int, kernel_size: int) -> list[Tensor]:
    """Return query, key, value and both embeddings."""
    shape = (_HEADS, channels // _HEADS // 2, kernel_size)
    tensors = [settings.features(channels, size) for _ in range(3)]
    return tensors + [torch.randn(shape, device=settings.device) for _ in range(2)]


def _op(
    settings: Settings,
    channels: int,
    size: int,
    kernel_size: int,
    backend: str | None,
    training: bool = False,
) -> Run:
    tensors = _tensors(settings, channels, size, kernel_size)
    options = {"kernel_size": kernel_size, "num_heads": _HEADS, "backend": backend}
    if not training:
        return lambda: local_attention(*tensors, **options)
    tensors = [x.requires_grad_() for x in tensors]
    grad = settings.features(channels, size)

    def run():
        return torch.autograd.grad(local_attention(*tensors, **options), tensors, grad)

    return run


def _convolution(channels: int, kernel_size: int = 3) -> nn.Module:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


_PASSES = {"forward": False, "forward + backward": True}
_HALO = "HaloAttn (timm)"
_UNFOLD = "unfold"


def _cases(
    group: str,
    name: str,
    title: str,
    ways: Mapping[str, Callable[..., Run]],
    passes: Mapping[str, bool] = _PASSES,
) -> list[Case]:
    """Return a case of the given ways, the baseline first, for each of the passes, by name.

    The ways are made with ``training=`` True or False; ``{}`` in the title stands for the pass.
    """
    cases = []
    for what, training in passes.items():
        contenders = tuple(
            Contender(
                way, partial(make, training=training), foreign=way == _HALO, slow=way == _UNFOLD
            )
            for way, make in ways.items()
        )
        names = (group, f"{name} {what}", title.format(what), contenders[0].name)
        cases.append(Case(*names, contenders, memory=True))
    return cases


def _op_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    op = partial(_op, settings, 256, size, 7)
    ways = {
        CONVOLUTION: partial(_passes, settings, partial(_convolution, 256), 256, size),
        ATTENTION: partial(op, None),
        "attention, loop in PyTorch": partial(op, "loop"),
        _UNFOLD: partial(op, "reference"),
    }
    title = f"attention alone, {{}}, {settings.batch}x256x{size}x{size}, k 7, 8 heads"
    forward, backward = _cases("op", "op", title, ways)

    def make_flex() -> Run:
        return others.flex_attention(*_tensors(settings, 256, size, 7), kernel_size=7)

    flex = Contender("FlexAttention", make_flex, foreign=True, slow=True)
    return [replace(forward, contenders=(*forward.contenders, flex)), backward]


def _layer_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    layers = {
        CONVOLUTION: partial(_convolution, 256),
        ATTENTION: partial(LocalSelfAttention2d, 256, 256),
        _UNFOLD: partial(LocalSelfAttention2d, 256, 256, backend="reference"),
        _HALO: partial(others.halo_attention, 256),
    }
    ways = {name: partial(_passes, settings, build, 256, size) for name, build in layers.items()}
    title = f"layer with projections, {{}}, {settings.batch}x256x{size}x{size}"
    return _cases("layer", "layer", title, ways)


def _stem_cases(settings: Settings) -> list[Case]:
    size = settings.image_size
    stems = {"convolutional stem": lambda: BasicStem(3, 64, "BN"), "attention stem": AttentionStem}
    ways = {name: partial(_passes, settings, build, 3, size) for name, build in stems.items()}
    return _cases("stem", "stem", f"stem, {{}}, {settings.batch}x3x{size}x{size}", ways)


_MODELS = {"convolutional": "retinanet_R_50.yaml", "attentional": "retinanet_SASA_R_50_full.yaml"}


def _config(settings: Settings, name: str) -> CfgNode:
    cfg = default_config()
    cfg.merge_from_file(str(settings.configs / "COCO-Detection" / name))
    cfg.MODEL.DEVICE = settings.device
    cfg.MODEL.WEIGHTS = ""
    # Norms that one process trains, on a CPU as well.
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


def _backbone_cases(settings: Settings) -> list[Case]:
    def build(name: str) -> nn.Module:
        return _Last(build_backbone(_config(settings, name), ShapeSpec(channels=3)).bottom_up)

    size = settings.image_size
    ways = {
        label: partial(_passes, settings, partial(build, name), 3, size)
        for label, name in _MODELS.items()
    }
    title = f"ResNet-50, {{}}, {settings.batch}x3x{size}x{size}"
    return _cases("backbone", "backbone", title, ways)


class _Last(nn.Module):
    """A backbone's last feature map."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return list(self.backbone(x).values())[-1]


def _retinanet_cases(settings: Settings) -> list[Case]:
    size = settings.image_size
    ways = {label: partial(_detection, settings, name) for label, name in _MODELS.items()}
    title = f"RetinaNet-50, {{}}, {settings.batch}x3x{size}x{size}"
    passes = {"inference": False, "training step": True}
    return _cases("retinanet", "RetinaNet-50", title, ways, passes)


def _detection(settings: Settings, name: str, training: bool) -> Run:
    model = build_model(_config(settings, name))
    inputs = _detection_inputs(settings)
    autocast = partial(
        torch.autocast,
        settings.device,
        dtype=settings.dtype,
        enabled=settings.dtype != torch.float32,
    )
    if not training:
        model.eval()

        def infer():
            with torch.no_grad(), autocast():
                return model(inputs)

        return infer
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        # RetinaNet's losses report to a storage.
        with EventStorage(), autocast():
            losses = model(inputs)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def _detection_inputs(settings: Settings) -> list[dict]:
    """Noise with five boxes an image."""
    size = settings.image_size
    inputs = []
    for _ in range(settings.batch):
        corner = torch.rand(5, 2) * size / 2
        boxes = torch.cat([corner, corner + size / 8 + torch.rand(5, 2) * size / 4], 1)
        instances = Instances((size, size), gt_boxes=Boxes(boxes), gt_classes=torch.arange(5))
        inputs.append({"image": torch.rand(3, size, size) * 255, "instances": instances})
    return inputs


def _kernel_size_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    return [
        _growth_case(settings, "kernel_size", k, size, {"k x k convolution": k, ATTENTION: k})
        for k in (3, 5, 7, 9, 11)
    ]


def _image_size_cases(settings: Settings) -> list[Case]:
    return [
        _growth_case(settings, "image_size", size, size // 8, {CONVOLUTION: 3, ATTENTION: 7})
        for size in (320, 640, 960, 1280)
    ]


def _growth_case(
    settings: Settings, group: str, at: int, size: int, kernel_sizes: Mapping[str, int]
) -> Case:
    """Compare a convolution with attention, by name and kernel size, in the forward pass."""
    baseline, attention = kernel_sizes
    layers = {
        baseline: partial(_convolution, 256, kernel_sizes[baseline]),
        attention: partial(LocalSelfAttention2d, 256, 256, kernel_sizes[attention]),
    }
    contenders = tuple(
        Contender(name, partial(_passes, settings, build, 256, size, False))
        for name, build in layers.items()
    )
    title = f"layer, forward, {settings.batch}x256x{size}x{size}"
    if group == "kernel_size":
        title += f", k {at}"
    return Case(group, f"{group.replace('_', ' ')} {at}", title, baseline, contenders, at=at)


GROUPS: dict[str, Callable[[Settings], list[Case]]] = {
    "op": _op_cases,
    "layer": _layer_cases,
    "stem": _stem_cases,
    "backbone": _backbone_cases,
    "retinanet": _retinanet_cases,
    "kernel_size": _kernel_size_cases,
    "image_size": _image_size_cases,
    "trainer": trainer_cases,
}


def make_cases(settings: Settings, groups: Iterable[str]) -> list[Case]:
    """Return the cases of the given groups, in the order of GROUPS."""
    return [case for group, make in GROUPS.items() if group in groups for case in make(settings)]
