"""Measurements on a GPU for the report of the CUDA kernels; they need torch alone.

What comes first matters most: errors of the kernels, what the GPU reaches at best, the layers of
RetinaNet-50 beside convolutions, whole models where detectron2 is installed, the choices that there
are for each kernel, and FlexAttention, which takes seconds to compile for each layer, as long as
there is time.
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
from ..ops import cuda_check
from ..ops.cuda_kernels import HEAD_WIDTHS, Maps, Variant
from ..ops.gpu_prediction import Gpu, Layer, layers_by_size
from ..ops.gpu_timing import Run, time_calls
from ..ops.levels import join, multiply_levels
from ..ops.operator import BACKENDS
from ..utils.files import write_text
from ..utils.machine import describe_machine
from . import others
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
    measured = Measured(describe_machine("cuda", "bfloat16"), _describe_backends(device))
    deadline = end - _LAST_PART
    parts = _parts(measured, device)
    torch.backends.cudnn.benchmark = True  # convolutions at their best
    for done, (name, run) in enumerate(parts):
        if time.monotonic() > deadline:
            left = ", ".join(name for name, _ in parts[done:])
            measured.notes.append(f"Not begun for want of time (--minutes): {left}.")
            break
        start = time.monotonic()
        run()
        now = time.monotonic()
        print(
            f"{name}: {now - start:.0f} s; {done + 1} of {len(parts)} parts, at most "
            f"{max(0, deadline - now):.0f} s until the last one begins",
            flush=True,
        )
        _write(output, measured, gpu, predicted)
    _write(output, measured, gpu, predicted)
    print(f"\n{as_markdown(measured, predicted, gpu)}\nWritten to {output}: report.md, report.json")


def _write(output: Path, measured: Measured, gpu: Gpu | None, predicted: Predicted) -> None:
    write_text(output / "report.md", as_markdown(measured, predicted, gpu))
    write_text(output / "report.json", as_json(measured, predicted))


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


def _parts(measured: Measured, device: torch.device) -> list[tuple[str, Callable[[], None]]]:
    """Return name and measurement of each part; it adds to what was measured."""

    def add_ceilings() -> None:
        measured.ceilings = measure_ceilings()

    def adding(rows: list, measure_rows: Callable, *arguments: object) -> Callable[[], None]:
        return lambda: rows.extend(measure_rows(*arguments))

    layers = layers_by_size()
    parts = [("errors", adding(measured.errors, measure_errors, device))]
    parts.append(("ceilings", add_ceilings))
    parts += [(x.name, adding(measured.layers, measure_layer, x, ways_of(x))) for x in layers]
    if find_spec("detectron2") is None:
        measured.notes.append("Models were left out, as detectron2 is not installed.")
    else:
        parts += [(name, adding(measured.models, x)) for name, x in _models()]
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


def measure_errors(device: torch.device) -> list[Errors]:
    """Compare the kernels with the loop backend in float32, in processes of their own."""
    variants, options = zip(*checked_variants(), strict=True)
    verdicts = cuda_check.check(variants, device)
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
        module = build(layer).to(device, _DTYPE, memory_format=torch.channels_last)
        for part in module.modules():
            if isinstance(part, LocalSelfAttention2d):
                for embedding in (part.rel_rows, part.rel_cols):
                    embedding.data = embedding.data.float()
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


def _models() -> Sequence[tuple[str, Callable[[], list[Row]]]]:
    from .gpu_networks import NETWORKS, network_maker

    settings = Settings("cuda", _DTYPE, 8, 640, CONFIGS)

    def measure_model(name: str, config: str) -> list[Row]:
        forward, step = (
            time_calls({name: network_maker(settings, config, x)}, ROUNDS, rotate=False)
            for x in (False, True)
        )
        problem = forward[1].get(name) or step[1].get(name)
        return [Row(name, name, forward[0].get(name), step[0].get(name), why_not=problem)]

    return [(name, partial(measure_model, name, config)) for name, config in NETWORKS.items()]
