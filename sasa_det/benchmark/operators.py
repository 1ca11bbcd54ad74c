"""Cases of operators, layers and stems, which need torch alone."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import AttentionStem, LocalSelfAttention2d
from ..ops import local_attention
from . import others
from .measure import Case, Contender, Run, Settings, cases_of_passes
from .peak import count_flops, of_pass
from .tiled_flex import TiledFlexAttention2d

_ATTENTION = "attention"
CONVOLUTION = "3x3 convolution"
_HEADS = 8


def module_run(
    settings: Settings,
    build: Callable[[], nn.Module],
    channels: int,
    size: int,
    training: bool,
    dtype: torch.dtype | None = None,
) -> Run:
    """Return a call of a module.

    Args:
        settings: of the run.
        build: makes the module.
        channels, size: of its input.
        training: forward, or forward and backward with gradients of weights and input.
        dtype: what autocast computes products in, if it does.
    """
    module, x = settings.place(build()), settings.features(channels, size)
    if not training:
        module.eval()

        def infer():
            with torch.no_grad(), settings.autocast(dtype):
                return module(x)

        return infer
    module.train()
    x.requires_grad_()
    with settings.autocast(dtype):
        grad = torch.randn_like(module(x))

    def run():
        x.grad = None
        module.zero_grad(set_to_none=True)
        with settings.autocast(dtype):
            y = module(x)
        y.backward(grad)

    return run


def _module_flops(
    settings: Settings, build: Callable[[], nn.Module], channels: int, size: int, training: bool
) -> int:
    return of_pass(count_flops(build, (settings.batch, channels, size, size)), training)


def module_contender(
    settings: Settings,
    name: str,
    build: Callable[[], nn.Module],
    channels: int,
    size: int,
    training: bool,
    counted: Callable[[], nn.Module] | None = None,
    **options,
) -> Contender:
    """Return a module as a contender.

    Args:
        settings, build, channels, size, training: see :func:`module_run`.
        name: see :class:`Contender`.
        counted: makes what FLOPs are counted of, if it is not the module itself.
        **options: of :class:`Contender`.
    """
    arguments = (channels, size, training)
    make = partial(module_run, settings, build, *arguments, options.get("dtype"))
    options.setdefault("flops", partial(_module_flops, settings, counted or build, *arguments))
    return Contender(name, make, **options)


def square_convolution(channels: int, kernel_size: int = 3) -> nn.Module:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


# The operator alone.


def _op_shapes(settings: Settings, channels: int, size: int, kernel_size: int) -> list[tuple]:
    """Return the shapes of query, key, value and both embeddings."""
    embedding = (_HEADS, channels // _HEADS // 2, kernel_size)
    return [(settings.batch, channels, size, size)] * 3 + [embedding] * 2


def _op_run(
    settings: Settings,
    channels: int,
    size: int,
    kernel_size: int,
    training: bool,
    backend: str | None = None,
) -> Run:
    tensors = _op_tensors(settings, channels, size, kernel_size)
    options = {"kernel_size": kernel_size, "num_heads": _HEADS, "backend": backend}
    if not training:
        return lambda: local_attention(*tensors, **options)
    tensors = [x.requires_grad_() for x in tensors]
    grad = settings.features(channels, size)

    def run():
        return torch.autograd.grad(local_attention(*tensors, **options), tensors, grad)

    return run


def _op_tensors(settings: Settings, channels: int, size: int, kernel_size: int) -> list[Tensor]:
    shapes = _op_shapes(settings, channels, size, kernel_size)
    features = [settings.features(channels, size) for _ in range(3)]
    return features + [torch.randn(shape, device=settings.device) for shape in shapes[3:]]


def _op_flops(
    settings: Settings, channels: int, size: int, kernel_size: int, training: bool
) -> int:
    attend = partial(local_attention, kernel_size=kernel_size, num_heads=_HEADS)
    shapes = _op_shapes(settings, channels, size, kernel_size)
    return of_pass(count_flops(lambda: attend, *shapes), training)


def _op_contenders(
    settings: Settings, channels: int, size: int, others_too: bool, training: bool
) -> list[Contender]:
    arguments = (settings, channels, size, 7, training)
    run, flops = partial(_op_run, *arguments), partial(_op_flops, *arguments)
    build = partial(square_convolution, channels)
    contenders = [
        module_contender(settings, CONVOLUTION, build, channels, size, training),
        Contender(_ATTENTION, run, flops=flops),
    ]
    if not others_too:
        return contenders
    contenders += [
        Contender("attention, loop in PyTorch", partial(run, backend="loop"), flops=flops),
        Contender("unfold", partial(run, backend="reference"), flops=flops, slow=True),
    ]
    # On GPUs, the layer has it in tiles.
    if not training and settings.device == "cpu":

        def make_flex() -> Run:
            return others.flex_attention(*_op_tensors(settings, channels, size, 7), kernel_size=7)

        contenders.append(Contender("FlexAttention", make_flex, foreign=True, slow=True))
    return contenders


def _op_cases(settings: Settings) -> list[Case]:
    def title(channels: int, size: int) -> str:
        features = f"{settings.batch}x{channels}x{size}x{size}"
        return f"attention alone, {{}}, {features}, k 7, {_HEADS} heads"

    size = settings.image_size // 8
    contenders = partial(_op_contenders, settings, 256, size, True)
    cases = cases_of_passes("op", "op", title(256, size), contenders)
    for channels, stride in ((64, 4), (128, 8), (512, 32)):
        size = settings.image_size // stride
        contenders = partial(_op_contenders, settings, channels, size, False)
        forward = {"forward": False}
        name = f"op {channels}"
        cases += cases_of_passes("op", name, title(channels, size), contenders, forward, False)
    return cases


# Layers and stems.


def _layer_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    convolution = partial(square_convolution, 256)
    attention = partial(LocalSelfAttention2d, 256, 256)
    unfold, halo = partial(attention, backend="reference"), partial(others.halo_attention, 256)

    def contenders(training: bool) -> list[Contender]:
        def contender(name: str, build: Callable[[], nn.Module], **options) -> Contender:
            return module_contender(settings, name, build, 256, size, training, **options)

        made = [
            contender(CONVOLUTION, convolution),
            contender(_ATTENTION, attention),
            contender("unfold", unfold, counted=attention, slow=True),
            contender("HaloAttn (timm)", halo, flops=None, foreign=True),
        ]
        if settings.device == "cuda":
            flex = partial(TiledFlexAttention2d, 256, size, size)
            made.append(contender("FlexAttention", flex, flops=None, foreign=True, slow=True))
        if settings.bfloat16:
            rival = f"{CONVOLUTION}, bfloat16"
            for name, build in ((rival, convolution), (f"{_ATTENTION}, bfloat16", attention)):
                made.append(contender(name, build, rival=rival, dtype=torch.bfloat16))
        return made

    title = f"layer with projections, {{}}, {settings.batch}x256x{size}x{size}"
    return cases_of_passes("layer", "layer", title, contenders)


def convolutional_stem() -> nn.Sequential:
    """Return the stem of a ResNet, as detectron2's BasicStem."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _fused_stem() -> nn.Sequential:
    convolution, norm, *others = convolutional_stem().eval()
    return nn.Sequential(fuse_conv_bn_eval(convolution, norm), *others)


def _stem_cases(settings: Settings) -> list[Case]:
    size = settings.image_size

    def contenders(training: bool) -> list[Contender]:
        stems = {"convolutional stem": convolutional_stem, "attention stem": AttentionStem}
        rival = None if training else "convolutional stem, fused"
        if rival is not None:
            stems[rival] = _fused_stem
        return [
            module_contender(settings, name, build, 3, size, training, rival=rival)
            for name, build in stems.items()
        ]

    title = f"stem, {{}}, {settings.batch}x3x{size}x{size}"
    return cases_of_passes("stem", "stem", title, contenders)


# Growth with the size of the window and of the image.


def _kernel_size_cases(settings: Settings) -> list[Case]:
    size = settings.image_size // 8
    return [
        _growth_case(settings, "kernel_size", k, size, {"k x k convolution": k, _ATTENTION: k})
        for k in (3, 5, 7, 9, 11)
    ]


def _image_size_cases(settings: Settings) -> list[Case]:
    return [
        _growth_case(settings, "image_size", size, size // 8, {CONVOLUTION: 3, _ATTENTION: 7})
        for size in (320, 640, 960, 1280)
    ]


def _growth_case(
    settings: Settings, group: str, at: int, size: int, kernel_sizes: Mapping[str, int]
) -> Case:
    """Compare a convolution with attention, by name and kernel size, in the forward pass."""
    baseline, attention = kernel_sizes
    layers = {
        baseline: partial(square_convolution, 256, kernel_sizes[baseline]),
        attention: partial(LocalSelfAttention2d, 256, 256, kernel_sizes[attention]),
    }
    contenders = tuple(
        module_contender(settings, name, build, 256, size, False) for name, build in layers.items()
    )
    title = f"layer, forward, {settings.batch}x256x{size}x{size}"
    if group == "kernel_size":
        title += f", k {at}"
    return Case(group, f"{group.replace('_', ' ')} {at}", title, contenders, at=at)


CASES: dict[str, Callable[[Settings], list[Case]]] = {
    "op": _op_cases,
    "layer": _layer_cases,
    "stem": _stem_cases,
    "kernel_size": _kernel_size_cases,
    "image_size": _image_size_cases,
}
