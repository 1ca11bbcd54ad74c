"""A model of the time that the CUDA kernels take, from what they execute and move.

The time of an SM is that of issuing all instructions and, after it, that of all wavefronts into and
out of shared memory: warps wait for each other too often for both at once. Products of the tensor
cores take less time than that, and are not counted. This comes close to what an H200 took for an
earlier version of the kernels, which had more warps (docs/gpu.md).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .cuda_kernels import PARTS_OF_TILE, Maps, Variant, blocks_of, embedding_sums_shape
from .gpu_instructions import Work

_ISSUES = 4  # instructions that an SM issues in a clock, in which it has one wavefront
_NOT_OVERLAPPED = 0.25  # of the shorter of arithmetic and memory traffic
_START = 3e-6  # seconds to start a kernel
_SHORTEST = 5e-6  # seconds of a convolution or a product, at least


@dataclass(frozen=True)
class Gpu:
    """A GPU, in FLOPs, bytes and clocks per second.

    Args:
        name: what it is called.
        architecture: what kernels are compiled for.
        clocks: of all SMs together.
        bandwidth: of its memory.
        convolution: of cuDNN's 3x3 convolutions in bfloat16 by number of channels.
        product: of large matrix products in bfloat16.
    """

    name: str
    architecture: str
    clocks: float
    bandwidth: float
    convolution: dict[int, float]
    product: float


GPUS = (
    Gpu(
        "H100",
        "sm_90",
        clocks=132 * 1.755e9,
        bandwidth=3.0e12,
        convolution={64: 300e12, 128: 450e12, 256: 550e12, 512: 550e12},
        product=550e12,
    ),
    Gpu(
        "A100",
        "sm_80",
        clocks=108 * 1.41e9,
        bandwidth=1.7e12,
        convolution={64: 130e12, 128: 180e12, 256: 200e12, 512: 200e12},
        product=200e12,
    ),
)
# The H100 with another memory.
_H200 = replace(GPUS[0], name="H200", bandwidth=4.3e12)


def gpu_of(name: str) -> Gpu | None:
    """Return the GPU that is predicted of a device's name, such as "NVIDIA H100 80GB HBM3"."""
    return next((gpu for gpu in (*GPUS, _H200) if gpu.name in name), None)


WHOLE = "RetinaNet-50"  # all of its layers


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution and what takes its place: 8 heads, windows of 7x7, square maps.

    Args:
        channels, size: of the map that it takes.
        count: how often it occurs.
        batch, heads: number of images, and of heads.
        stride: of the convolution. Attention takes all pixels, and its kernels pool.
        outputs: channels of the result, None for as many as it takes. A 1x1 convolution that makes
            them follows attention.
        other_sizes: of further maps that it takes, each in a call of the convolution, and all in
            one of attention.
    """

    channels: int
    size: int
    count: int = 1
    batch: int = 8
    heads: int = 8
    stride: int = 1
    outputs: int | None = None
    other_sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        outputs = f" to {self.outputs}" if self.outputs else ""
        sizes = "+".join(map(str, self.sizes))
        return f"{self.channels}@{sizes}{stride}{outputs}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size, *self.other_sizes)

    @property
    def levels(self) -> list["Layer"]:
        """The same layer on each of its maps alone."""
        return [replace(self, size=size, other_sizes=()) for size in self.sizes]

    @property
    def is_plain(self) -> bool:
        """Whether there is one map, and the result is as large as it is."""
        return self.stride == 1 and self.outputs is None and not self.other_sizes

    @property
    def unit(self) -> int:
        """Bytes of the maps in bfloat16."""
        return 2 * self.batch * sum(size**2 for size in self.sizes) * self.channels

    @property
    def result(self) -> int:
        """Bytes of the result."""
        return self.unit // self.stride**2 // self.channels * (self.outputs or self.channels)


_LEVELS = (80, 40, 20, 10, 5)
# All of RetinaNet-50 for images of 640 x 640. The heads' are on five levels each.
RETINANET = (
    # Backbone.
    Layer(64, 160, 3),
    Layer(128, 160, stride=2),
    Layer(128, 80, 3),
    Layer(256, 80, stride=2),
    Layer(256, 40, 5),
    Layer(512, 40, stride=2),
    Layer(512, 20, 2),
    # FPN, P6 and P7.
    *(Layer(256, size) for size in (80, 40, 20)),
    *(Layer(256, size, stride=2) for size in (20, 10)),
    # Heads.
    Layer(256, _LEVELS[0], 8, other_sizes=_LEVELS[1:]),
    *(Layer(256, _LEVELS[0], outputs=x, other_sizes=_LEVELS[1:]) for x in (720, 36)),
)


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward pass."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Times") -> "Times":
        return Times(self.forward + other.forward, self.backward + other.backward)

    def __rmul__(self, count: int) -> "Times":
        return Times(count * self.forward, count * self.backward)


def layers_by_size() -> list[Layer]:
    """Return the layers of RetinaNet-50 with one for all that are equal, by channels and size."""
    counts: dict[Layer, int] = {}
    for layer in RETINANET:
        kind = replace(layer, count=1)
        counts[kind] = counts.get(kind, 0) + layer.count
    layers = (replace(kind, count=count) for kind, count in counts.items())
    return sorted(
        layers, key=lambda x: (x.channels, x.outputs or 0, -x.size, x.stride, len(x.sizes))
    )


def convolution(layer: Layer, gpu: Gpu) -> Times:
    """Predict the 3x3 convolution."""
    if layer.other_sizes:
        return _sum(convolution(level, gpu) for level in layer.levels)
    flops = 9 * layer.channels * layer.result  # 2 for each product of 9 C inputs
    rate = gpu.convolution[layer.channels]
    forward = max(flops / rate, (layer.unit + layer.result) / gpu.bandwidth, _SHORTEST)
    return Times(forward, 2 * forward)


def attention(layer: Layer, gpu: Gpu, work: Callable[[str, int, bool], Work]) -> Times:
    """Predict the attention layer: the product that makes query, key and value, and the kernels.

    And the 1x1 convolution that follows it, if there is one.

    Args:
        layer: what to predict.
        gpu: on what.
        work: of a kernel, a head width, and whether it pools, as
            :func:`sasa_det.ops.gpu_instructions.work_per_head` counts it.
    """
    flops = 3 * layer.channels * layer.unit
    product = max(flops / gpu.product, 4 * layer.unit / gpu.bandwidth, _SHORTEST)
    maps = Maps(layer.batch, tuple((size, size) for size in layer.sizes))
    pooled = layer.stride == 2

    def kernel(name: str, units: float, more: float = 0) -> float:
        head_width = layer.channels // layer.heads
        variant = Variant(None, head_width, 7)
        blocks = blocks_of(variant, maps, layer.channels)
        done = work(name, head_width, pooled)
        clocks = done.instructions / _ISSUES + done.wavefronts
        parts = blocks * PARTS_OF_TILE * variant.heads_of_block
        arithmetic = parts * clocks / gpu.clocks
        memory = (units * layer.unit + more) / gpu.bandwidth
        smaller, larger = sorted((arithmetic, memory))
        return larger + _NOT_OVERLAPPED * smaller + _START

    # Maps that they read and write, of which the output, or its gradient, may be pooled.
    output = 1 / layer.stride**2
    forward = kernel("local_attention_forward", 3 + output)
    # The kernel for queries writes sums of each tile, and another one adds them up.
    sums = 4 * math.prod(embedding_sums_shape(maps, layer.channels))
    backward = kernel("local_attention_query", 4 + output, sums)
    backward += kernel("local_attention_key", 5 + output)
    backward += sums / gpu.bandwidth + _START
    follows = _following(layer, gpu)
    return Times(product + forward, 2 * product + backward) + follows


def _following(layer: Layer, gpu: Gpu) -> Times:
    """Predict the 1x1 convolution that follows attention."""
    if layer.outputs is None:
        return Times(0, 0)

    def product(part: Layer) -> float:
        flops = part.channels * part.result
        return max(flops / gpu.product, (part.unit + part.result) / gpu.bandwidth, _SHORTEST)

    # Gradients come from each level.
    return Times(product(layer), 2 * sum(map(product, layer.levels)))


def _sum(times: Iterable[Times]) -> Times:
    return sum(times, Times(0, 0))
