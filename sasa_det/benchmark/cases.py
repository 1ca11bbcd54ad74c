"""What is measured: each case sets ways to do one thing side by side."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..config import add_sasa_config
from ..layers import AttentionStem, LocalSelfAttention2d
from ..ops import local_attention
from . import others
from .measure import Case, Contender, Run, Settings
from .training import trainer_cases

__all__ = ["GROUPS", "make_cases"]

GROUPS = ("op", "layer", "stem", "backbone", "retinanet", "kernel_size", "image_size", "trainer")
ATTENTION = "attention"
CONVOLUTION = "3x3 convolution"


def make_cases(settings: Settings, groups: Iterable[str]) -> list[Case]:
    """Return the cases of the given groups, in the order of GROUPS."""
    makers = {
        "op": _op_cases,
        "layer": _layer_cases,
        "stem": _stem_cases,
        "backbone": _backbone_cases,
        "retinanet": _retinanet_cases,
        "kernel_size": _kernel_size_cases,
        "image_size": _image_size_cases,
        "trainer": trainer_cases,
    }
    return [case for group in GROUPS if group in groups for case in makers[group](settings)]


def _inference(module: nn.Module, *inputs: Tensor) -> Run:
    module.eval()

    def run():
        with torch.no_grad():
            return module(*inputs)

    return run


def _training(module: nn.Module, x: Tensor) -> Run:
    """Forward and backward with gradients of weights and input."""
    module.train()
    x = x.detach().requires_grad_()
    grad = torch.randn_like(module(x))

    def run():
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(grad)

    return run


def _op(
    settings: Settings,
    channels: int,
    size: int,
    kernel_size: int,
    backend: str | None,
    training: bool = False,
) -> Run:
    heads = 8
    tensors = [settings.features(channels, size) for _ in range(3)]
    shape = (heads, channels // heads // 2, kernel_size)
    tensors += [torch.randn(shape, device=settings.device) for _ in range(2)]
    options = {"kernel_size": kernel_size, "num_heads": heads, "backend": backend}
    if not training:
        return lambda: local_attention(*tensors, **options)
    tensors = [x.requires_grad_() for x in tensors]
    grad = settings.features(channels, size)

    def run():
        return torch.autograd.grad(local_attention(*tensors, **options), tensors, grad)

    return run


def _flex(settings: Settings, channels: int, size: int, kernel_size: int) -> Run:
    query, key, value = (settings.features(channels, size) for _ in range(3))
    shape = (8, channels // 16, kernel_size)
    rows, cols = (torch.randn(shape, device=settings.device) for _ in range(2))
    return others.flex_attention(query, key, value, rows, cols, kernel_size)


def _convolution(channels: int, kernel_size: int = 3) -> nn.Module:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


def _layer(settings: Settings, build: Callable[[], nn.Module], size: int, training: bool) -> Run:
    module, x = settings.place(build()), settings.features(256, size)
    return _training(module, x) if training else _inference(module, x)


def _op_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    cases = []
    for training in (False, True):
        what = "forward + backward" if training else "forward"
        op = partial(_op, settings, 256, size, 7, training=training)
        convolution = partial(_layer, settings, partial(_convolution, 256), size, training)
        contenders = [
            Contender(CONVOLUTION, convolution),
            Contender(ATTENTION, partial(op, None)),
            Contender("attention, loop in PyTorch", partial(op, "loop")),
            Contender("unfold", partial(op, "reference"), slow=True),
        ]
        if not training:
            flex = partial(_flex, settings, 256, size, 7)
            contenders.append(Contender("FlexAttention", flex, foreign=True, slow=True))
        title = f"attention alone, {what}, {settings.batch}x256x{size}x{size}, k 7, 8 heads"
        cases.append(Case("op", f"op {what}", title, CONVOLUTION, tuple(contenders), memory=True))
    return cases


def _layer_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    cases = []
    for training in (False, True):
        what = "forward + backward" if training else "forward"
        ways = {
            CONVOLUTION: partial(_convolution, 256),
            ATTENTION: partial(LocalSelfAttention2d, 256, 256),
            "unfold": partial(LocalSelfAttention2d, 256, 256, backend="reference"),
            "HaloAttn (timm)": partial(others.halo_attention, 256),
        }
        contenders = tuple(
            Contender(
                name,
                partial(_layer, settings, build, size, training),
                foreign=name.startswith("HaloAttn"),
                slow=name == "unfold",
            )
            for name, build in ways.items()
        )
        title = f"layer with projections, {what}, {settings.batch}x256x{size}x{size}"
        cases.append(Case("layer", f"layer {what}", title, CONVOLUTION, contenders, memory=True))
    return cases


def _stem_cases(settings: Settings) -> list[Case]:
    size = settings.image_size

    def run(build: Callable[[], nn.Module], training: bool) -> Run:
        module, x = settings.place(build()), settings.features(3, size)
        return _training(module, x) if training else _inference(module, x)

    ways = {"convolutional stem": lambda: BasicStem(3, 64, "BN"), "attention stem": AttentionStem}
    return [
        Case(
            "stem",
            f"stem {what}",
            f"stem, {what}, {settings.batch}x3x{size}x{size}",
            "convolutional stem",
            tuple(Contender(name, partial(run, way, training)) for name, way in ways.items()),
            memory=True,
        )
        for what, training in (("forward", False), ("forward + backward", True))
    ]


_MODELS = {"convolutional": "retinanet_R_50.yaml", "attentional": "retinanet_SASA_R_50_full.yaml"}


def _config(settings: Settings, name: str) -> CfgNode:
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.merge_from_file(str(settings.configs / "COCO-Detection" / name))
    cfg.MODEL.DEVICE = settings.device
    cfg.MODEL.WEIGHTS = ""
    # Norms that one process trains, on a CPU as well.
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = cfg.MODEL.RETINANET.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


def _models(run: Callable[[str, bool], Run], training: bool) -> tuple[Contender, ...]:
    return tuple(Contender(label, partial(run, name, training)) for label, name in _MODELS.items())


def _backbone_cases(settings: Settings) -> list[Case]:
    def run(name: str, training: bool) -> Run:
        cfg = _config(settings, name)
        backbone = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up
        module = settings.place(_Last(backbone))
        x = settings.features(3, settings.image_size)
        return _training(module, x) if training else _inference(module, x)

    return [
        Case(
            "backbone",
            f"backbone {what}",
            f"ResNet-50, {what}, {settings.batch}x3x{settings.image_size}x{settings.image_size}",
            "convolutional",
            _models(run, training),
            memory=True,
        )
        for what, training in (("forward", False), ("forward + backward", True))
    ]


class _Last(nn.Module):
    """A backbone's last feature map."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return list(self.backbone(x).values())[-1]


def _retinanet_cases(settings: Settings) -> list[Case]:
    def run(name: str, training: bool) -> Run:
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

    size = settings.image_size
    return [
        Case(
            "retinanet",
            f"RetinaNet-50 {what}",
            f"RetinaNet-50, {what}, {settings.batch}x3x{size}x{size}",
            "convolutional",
            _models(run, training),
            memory=True,
        )
        for what, training in (("inference", False), ("training step", True))
    ]


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
    cases = []
    for kernel_size in (3, 5, 7, 9, 11):
        attention = partial(LocalSelfAttention2d, 256, 256, kernel_size)
        convolution = partial(_convolution, 256, kernel_size)
        contenders = (
            Contender("k x k convolution", partial(_layer, settings, convolution, size, False)),
            Contender(ATTENTION, partial(_layer, settings, attention, size, False)),
        )
        title = f"layer, forward, {settings.batch}x256x{size}x{size}, k {kernel_size}"
        name = f"kernel size {kernel_size}"
        cases.append(
            Case("kernel_size", name, title, "k x k convolution", contenders, at=kernel_size)
        )
    return cases


def _image_size_cases(settings: Settings) -> list[Case]:
    cases = []
    for image_size in (320, 640, 960, 1280):
        size = image_size // 8
        attention = partial(LocalSelfAttention2d, 256, 256)
        contenders = (
            Contender(
                CONVOLUTION, partial(_layer, settings, partial(_convolution, 256), size, False)
            ),
            Contender(ATTENTION, partial(_layer, settings, attention, size, False)),
        )
        title = f"layer, forward, {settings.batch}x256x{size}x{size}"
        name = f"image size {image_size}"
        cases.append(Case("image_size", name, title, CONVOLUTION, contenders, at=image_size))
    return cases
