"""Measurements on a GPU for the report of the CUDA kernels; they need torch alone.

What comes first matters most: errors of the kernels, what the GPU reaches at best, the layers of
RetinaNet-50 beside convolutions, errors of other pieces, whole models where detectron2 is
installed, the choices that there are for each kernel, and FlexAttention, which takes seconds to
compile for each layer, as long as there is time. What fails is in the report, and the next part
goes on.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config_files import CONFIGS
from ..layers import LocalSelfAttention2d
from ..layers.joined import attend_levels, runs_on_levels
from ..ops import cpu, cuda, cuda_check, cuda_layer
from ..ops.cuda_compiler import describe_versions
from ..ops.cuda_kernels import HEAD_WIDTHS, Maps, Variant
from ..ops.gpu_prediction import Gpu, Layer, layers_by_size
from ..ops.gpu_timing import Run, describe_error, time_calls
from ..ops.levels import join, multiply_levels
from ..ops.operator import BACKENDS
from ..utils.files import write_text
from ..utils.machine import describe_machine
from . import others
from .gpu_checks import checks_parts, in_bfloat16
from .gpu_choices import choices_parts
from .gpu_tables import (
    ATTENTION,
    CONVOLUTION,
    Ceilings,
    Errors,
    Measured,
    Predicted,
    Row,
    as_json,
    as_markdown,
)
from .measure import Settings
from .tiled_flex import TiledFlexAttention2d

logger = logging.getLogger(__name__)

ROUNDS = 11
_LAST_PART = 30  # seconds that it may take
_FOR_ERRORS = 0.5  # of the time that there is
_DTYPE = torch.bfloat16
_COPIED_BYTES = 1 << 30
_PRODUCT = 8192  # side of the matrices

Make = Callable[[], Run]
Build = Callable[[Layer], nn.Module]


def measure(output: Path, end: float, gpu: Gpu | None, predicted: Predicted) -> None:
    """Measure, write ``report.json`` and ``report.md`` after each part, and print the second.

    Args:
        output: a new folder.
        end: by ``time.monotonic``; no part begins in the last half minute before it.
        gpu: what was predicted for, or None.
        predicted: see :func:`sasa_det.benchmark.gpu_tables.as_markdown`.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    measured = Measured(_describe_software())
    deadline = end - _LAST_PART
    torch.backends.cudnn.benchmark = True  # convolutions at their best

    def write() -> None:
        write_text(output / "report.md", as_markdown(measured, predicted, gpu))
        write_text(output / "report.json", as_json(measured, predicted))

    run_parts(measured, _parts(measured, device, deadline), deadline, write, torch.cuda.synchronize)
    print(f"\n{as_markdown(measured, predicted, gpu)}\nWritten to {output}: report.md, report.json")


def run_parts(
    measured: Measured,
    parts: Sequence[tuple[str, Callable[[], object]]],
    deadline: float,
    write: Callable[[], None],
    use: Callable[[], object],
) -> None:
    """Run parts, as long as there is time; note what fails, and go on.

    Args:
        measured: what the parts add to.
        parts: their names and what they do.
        deadline: by ``time.monotonic``, after which none begins.
        write: writes what was measured, after each part.
        use: uses the GPU; after a part failed, it fails if no other one can run.
    """
    for done, (name, run) in enumerate(parts):
        if time.monotonic() > deadline:
            left = ", ".join(name for name, _ in parts[done:])
            measured.notes.append(f"Not begun for want of time (--minutes): {left}.")
            break
        start = time.monotonic()
        failure = _failure(run)
        now = time.monotonic()
        measured.seconds[name] = now - start
        if failure:
            measured.notes.append(f"{name} failed: {failure.rstrip('.')}.")
            if _failure(use):
                left = ", ".join(name for name, _ in parts[done + 1 :])
                measured.notes.append(f"The GPU cannot be used any more, for: {left or 'nothing'}.")
                break
        print(
            f"{name}{' failed' if failure else ''}: {now - start:.0f} s; {done + 1} of "
            f"{len(parts)} parts, at most {max(0, deadline - now):.0f} s until the last one begins",
            flush=True,
        )
        write()
    write()


def _failure(run: Callable[[], object]) -> str | None:
    """Return the error of a part, or None."""
    try:
        run()
    except Exception as error:  # of whatever library it calls
        logger.warning("What follows is in the report.", exc_info=True)
        return describe_error(error)
    return None


def _describe_software() -> str:
    """Say what runs on what, and what there is of the project."""
    extension = cpu.MISSING or "layers are called from C++"
    versions = cuda.MISSING or describe_versions()
    return f"{describe_machine('cuda', 'bfloat16')}, {versions}, {extension}"


def _describe_backends(device: torch.device) -> str:
    """Name the backend of local_attention that runs the layers on the GPU."""
    backends = {}
    for layer in layers_by_size():
        query = torch.zeros(1, layer.channels, 8, 8, dtype=_DTYPE, device=device)
        runs = (name for name, x in BACKENDS.items() if x.why_not(query, layer.heads, 7) is None)
        backends[layer.name] = next(runs)
    if len(set(backends.values())) == 1:
        return backends.popitem()[1]
    return ", ".join(f"{backend} for {name}" for name, backend in backends.items())


def _parts(
    measured: Measured, device: torch.device, deadline: float
) -> list[tuple[str, Callable[[], None]]]:
    """Return name and measurement of each part; it adds to what was measured."""

    def add_errors() -> None:
        seconds = _FOR_ERRORS * (deadline - time.monotonic())
        measured.errors.extend(measure_errors(device, seconds))
        measured.backend = _describe_backends(device)

    def add_ceilings() -> None:
        measured.ceilings = measure_ceilings()

    def adding(rows: list, measure_rows: Callable, *arguments: object) -> Callable[[], None]:
        return lambda: rows.extend(measure_rows(*arguments))

    layers = layers_by_size()
    parts = [("errors", add_errors), ("ceilings", add_ceilings)]
    parts += [(x.name, adding(measured.layers, measure_layer, x, ways_of(x))) for x in layers]
    parts += [(name, adding(measured.comparisons, x)) for name, x in checks_parts(device)]
    if find_spec("detectron2") is None:
        measured.notes.append("Models were left out, as detectron2 is not installed.")
    else:
        parts += [(x, adding(measured.models, measure_model, x)) for x in MODELS]
    parts += [(name, adding(measured.choices, x)) for name, x in choices_parts(ROUNDS)]
    by_work = sorted(
        filter(lambda x: x.is_plain, layers), key=lambda x: x.count * x.unit, reverse=True
    )
    parts += [
        (f"FlexAttention {x.name}", adding(measured.layers, measure_layer, x, FLEX))
        for x in by_work
    ]
    return parts


def checked_variants() -> Iterator[tuple[Variant, str]]:
    """Yield the variants whose errors are measured, and how they differ from the usual one."""
    for dtype in (torch.bfloat16, torch.float16):
        for head_width in HEAD_WIDTHS:
            yield Variant(dtype, head_width, 7), "all"
    usual = Variant(torch.bfloat16, 32, 7)
    yield replace(usual, kernel_size=3), "all"
    yield replace(usual, kernel_size=5), "all"
    yield replace(usual, mask=False), "border zero"
    yield replace(usual, content=False), "q.r alone"
    yield replace(usual, position=False), "q.k alone"
    for head_width in (16, 32, 64):
        yield Variant(torch.bfloat16, head_width, 7, pooled=True), "a stride of 2"


def measure_errors(device: torch.device, seconds: float) -> list[Errors]:
    """Compare the kernels with the loop backend in float32, in processes of their own.

    Args:
        device: the GPU.
        seconds: that it may take.
    """
    # Layers that pool are called from C++ alone.
    checked = [x for x in checked_variants() if cuda_layer.is_there(device) or not x[0].pooled]
    variants, options = zip(*checked, strict=True)
    verdicts = cuda_check.check_now(variants, device, seconds)
    return [
        Errors(
            str(variant.dtype).removeprefix("torch."),
            variant.head_width,
            variant.kernel_size,
            option,
            verdict.errors,
            verdict.problem,
        )
        for variant, option, verdict in zip(variants, options, verdicts, strict=True)
    ]


def measure_ceilings() -> Ceilings:
    """Measure a large copy and a large product."""

    def copy() -> Run:
        # By a kernel, as the GPU's engine for copies is slower.
        source = torch.randn(_COPIED_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        return lambda: torch.neg(source, out=target)

    def product() -> Run:
        # Numbers that are not zero, for which a GPU clocks lower.
        a, b = (torch.randn(_PRODUCT, _PRODUCT, device="cuda", dtype=_DTYPE) for _ in range(2))
        return lambda: a @ b

    seconds, problems = time_calls({"copy": copy, "product": product}, ROUNDS)
    if problems:
        raise RuntimeError(f"The GPU cannot be timed: {problems}")
    return Ceilings(2 * _COPIED_BYTES / seconds["copy"], 2 * _PRODUCT**3 / seconds["product"])


class OnMaps(nn.Module):
    """A layer on the maps of levels, one after the other."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def inputs_of(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return what the layer is called with, for (N, C, H, W) of each level."""
        return list(maps)

    def forward(self, *maps: Tensor) -> list[Tensor]:
        return [self.layer(x) for x in maps]


class OnLevels(OnMaps):
    """Attention, and what makes its outputs, on all levels at once, as in RetinaNet's heads."""

    _maps: Maps | None = None

    def inputs_of(self, maps: Sequence[Tensor]) -> list[Tensor]:
        attention = self.layer[0]
        if len(maps) == 1 or not all(map(partial(runs_on_levels, attention), maps)):
            return list(maps)
        pixels, self._maps = join(maps)
        return [pixels]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if self._maps is None:
            return super().forward(*inputs)
        attention, *last = self.layer
        pixels = attend_levels(attention, *inputs, self._maps)
        if not last:
            return [pixels]
        return multiply_levels(pixels, last[0].weight, last[0].bias, self._maps)


def _convolution(layer: Layer) -> nn.Module:
    outputs = layer.outputs or layer.channels
    return OnMaps(nn.Conv2d(layer.channels, outputs, 3, layer.stride, padding=1, bias=False))


def _attention(layer: Layer) -> nn.Module:
    options = {"num_heads": layer.heads, "stride": layer.stride}
    attention = LocalSelfAttention2d(layer.channels, layer.channels, **options)
    if layer.outputs is None:
        return OnLevels(nn.Sequential(attention))
    last = nn.Conv2d(layer.channels, layer.outputs, 1, bias=False)
    return OnLevels(nn.Sequential(attention, last))


def _halo(layer: Layer) -> nn.Module:
    return OnMaps(others.halo_attention(layer.channels))


def _flex(layer: Layer) -> nn.Module:
    return OnMaps(TiledFlexAttention2d(layer.channels, layer.size, layer.size, layer.heads))


WAYS: dict[str, Build] = {
    CONVOLUTION: _convolution,
    ATTENTION: _attention,
    "HaloAttn (timm)": _halo,
}


def ways_of(layer: Layer) -> dict[str, Build]:
    """Return the ways to do what a layer does; other projects have those of the same size alone."""
    return WAYS if layer.is_plain else {x: WAYS[x] for x in (CONVOLUTION, ATTENTION)}


FLEX: dict[str, Build] = {"FlexAttention in tiles": _flex}


def measure_layer(layer: Layer, ways: Mapping[str, Build]) -> list[Row]:
    """Measure modules in place of a layer, forward, and forward and backward."""
    # Of torch.compile, which stops to compile after a number of sizes.
    torch.compiler.reset()
    forward, step = (
        time_calls(
            {name: layer_maker(layer, build, training, "cuda") for name, build in ways.items()},
            ROUNDS,
        )
        for training in (False, True)
    )
    return [
        Row(
            *(layer.name, name, forward[0].get(name), step[0].get(name), layer.count),
            why_not=forward[1].get(name) or step[1].get(name),
        )
        for name in ways
    ]


def layer_maker(layer: Layer, build: Build, training: bool, device: str) -> Make:
    """Return what makes a module and its call.

    Weights are bfloat16; relative embeddings of this project stay float32, as under autocast.

    Args:
        layer: its place.
        build: makes the module.
        training: forward and backward with gradients of weights and input, or forward alone.
        device: where it runs.
    """

    def make() -> Run:
        module = in_bfloat16(build(layer), device)
        maps = [
            torch.randn(layer.batch, layer.channels, size, size, device=device, dtype=_DTYPE)
            for size in layer.sizes
        ]
        maps = [x.to(memory_format=torch.channels_last) for x in maps]
        given = [x.detach() for x in module.inputs_of(maps)]
        if not training:

            def infer() -> list[Tensor]:
                with torch.no_grad():
                    return module(*given)

            return infer
        inputs = [*(x.requires_grad_() for x in given), *module.parameters()]
        with torch.no_grad():
            grads = [torch.randn_like(x) for x in module(*given)]
        return lambda: torch.autograd.grad(module(*given), inputs, grads)

    return make


# RetinaNet-50 by names in the report, the first one to compare with.
MODELS = {
    "convolutional": "COCO-Detection/retinanet_R_50.yaml",
    "attentional": "COCO-Detection/retinanet_SASA_R_50_full.yaml",
    "attentional, convolutional stem": "COCO-Detection/retinanet_SASA_R_50_convstem_full.yaml",
}


def measure_model(name: str) -> list[Row]:
    """Measure one of :data:`MODELS`, which takes detectron2."""
    from .gpu_networks import network_maker

    settings = Settings("cuda", _DTYPE, 8, 640, CONFIGS)
    forward, step = (
        time_calls({name: network_maker(settings, MODELS[name], x)}, ROUNDS, rotate=False)
        for x in (False, True)
    )
    problem = forward[1].get(name) or step[1].get(name)
    return [Row(name, name, forward[0].get(name), step[0].get(name), why_not=problem)]
