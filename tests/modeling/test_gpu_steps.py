"""What a GPU is asked to do in a step of RetinaNet-50, traced with meta tensors.

Meta tensors have shapes and strides and no values: whatever waits for a value raises an error.
"""

import collections
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sasa_det.benchmark.gpu_measure import MODELS
from sasa_det.benchmark.gpu_networks import network_maker
from sasa_det.benchmark.measure import Settings
from sasa_det.config_files import CONFIGS
from sasa_det.layers import attention_stem
from sasa_det.ops import cuda, stem_cuda
from sasa_det.ops.gpu_prediction import RETINANET

COPIES = ("_to_copy", "clone", "copy_")
ATTENTION = ("joined_attention", "joined_attention_backward")
TAKE_CHANNELS_LAST = ("convolution", "convolution_backward", *ATTENTION)


class Trace(TorchDispatchMode):
    """Counts calls of operators, and copies that change the layout of a map.

    A convolution whose tensors have another layout than channels_last makes such copies itself.
    """

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.maps = collections.Counter()  # of attention and 3x3 convolutions, and their channels
        self.layout_copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A copy from the host would wait, but for numbers that are arguments of kernels.
        assert all(x.device.type == "meta" or x.dim() == 0 for x in tensors), name
        result = function(*args, **(kwargs or {}))
        self.calls[name] += 1
        if name == "joined_attention":
            _, channels, height, _ = args[0].shape
            self.maps[channels // 3, height] += 1
        if name == "convolution" and args[1].shape[2] == 3:
            outputs, channels, *_ = args[1].shape
            self.maps[channels, args[0].shape[2], args[3][0], outputs] += 1
        if name in COPIES and is_map(result) and order_of(tensors[-1]) != order_of(result):
            self.layout_copies.append((name, tuple(result.shape)))
        if name in TAKE_CHANNELS_LAST:
            self.layout_copies += [
                (name, tuple(x.shape))
                for x in tensors
                if is_map(x) and x.dtype == torch.bfloat16 and not is_channels_last(x)
            ]
        # Meta convolutions have contiguous results; cuDNN's have the layout of what is given.
        if name == "convolution" and is_channels_last(tensors[0]):
            result = result.contiguous(memory_format=torch.channels_last)
        if name == "convolution_backward" and is_channels_last(tensors[0]):
            first, *others = result
            result = (
                None if first is None else first.contiguous(memory_format=torch.channels_last),
                *others,
            )
        return result


def is_map(x):
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and x.dim() == 4
        and x.shape[1] > 1
        and x.shape[2] * x.shape[3] > 1
    )


def is_channels_last(x):
    """Tell it of slices of channels too."""
    height, width = x.shape[2:]
    return x.stride(1) == 1 and (height == 1 or width == 1 or x.stride(2) == width * x.stride(3))


def order_of(x):
    """Return the dimensions that have more than one index, as they lie in memory."""
    return sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=x.stride, reverse=True)


def trace(name, training):
    """Trace a call of a network with 8 images of 640 x 640, in bfloat16 and channels_last."""
    settings = Settings("meta", torch.bfloat16, 8, 640, CONFIGS)
    with pytest.MonkeyPatch.context() as patch:
        # As on a GPU that runs the CUDA kernels.
        patch.setattr(cuda, "why_not_like", lambda *arguments, **options: None)
        patch.setattr(attention_stem, "prefers_channels_last", lambda x: True)
        run = network_maker(settings, MODELS[name], training, autocast=False)()
        with Trace() as traced:
            run()
    return traced


@pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])
def test_attention_of_one_product_copies_no_map(training):
    traced = trace("attentional, convolutional stem", training)
    assert not traced.layout_copies
    # 16 blocks, 3 levels of the FPN and P6 and P7, and 2 subnets of 5 layers on 5 levels.
    layers = 16 + 3 + 2 + 2 * 5 * 5
    assert traced.calls["joined_attention"] == layers
    assert traced.calls["joined_attention_backward"] == (layers if training else 0)
    # A product makes queries, keys and values, and has two gradients.
    assert traced.calls["mm"] == (3 * layers if training else layers)
    assert traced.calls["local_attention"] == 0


def test_predictions_are_of_the_layers_that_the_models_have():
    attention, convolutions = collections.Counter(), collections.Counter()
    for x in (level for layer in RETINANET for level in layer.levels):
        attention[x.channels, x.size] += x.count
        convolutions[x.channels, x.size, x.stride, x.outputs or x.channels] += x.count
    assert trace("attentional, convolutional stem", False).maps == attention
    assert trace("convolutional", False).maps == convolutions


@pytest.fixture
def stem_kernels(monkeypatch):
    """Let the stem start its CUDA kernels, none of which runs; their names."""
    # Not what the package names like this, which is a function.
    operator, started = sys.modules["sasa_det.ops.stem_attention"], []

    def normalized(x, query, key, value, mixing, *arguments, num_heads, eps):
        matrices = operator._projections(query, key, value, mixing)
        return stem_cuda.normalized(x, *matrices, *arguments, num_heads, eps)

    for module in (operator, attention_stem):
        monkeypatch.setattr(module, "has_stem_kernels", lambda *arguments: True)
        monkeypatch.setattr(module, "normalized_stem_attention", normalized)
    monkeypatch.setattr(stem_cuda, "_grid", lambda inputs: 4 * 132)
    monkeypatch.setattr(
        cuda, "start", lambda launch, like: started.append(launch.name.split("<")[0])
    )
    return started


@pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])
def test_no_map_is_copied_where_the_stem_has_kernels(training, stem_kernels):
    traced = trace("attentional", training)
    assert not traced.layout_copies
    kernels = ["stem_attention_forward", "stem_attention_backward"]
    assert set(stem_kernels) == set(kernels[: 1 + training])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])
def test_a_stem_without_kernels_copies_its_own_maps_alone(training):
    traced = trace("attentional", training)
    names = [name for name, _ in traced.layout_copies]
    # Its output once; the gradients of its queries and keys, for the convolutions of the image.
    assert names == ["clone", *(2 * ["convolution_backward"] if training else [])]
    assert traced.layout_copies[0][1] == (8, 64, 160, 160)


def test_layout_copies_are_seen():
    x = torch.empty(2, 16, 6, 7, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(16, 16, 1, 1, dtype=torch.bfloat16, device="meta")
    last = x.contiguous(memory_format=torch.channels_last)
    with Trace() as traced:
        x.contiguous(memory_format=torch.channels_last)
        last.contiguous()
        last.permute(0, 2, 3, 1).contiguous()  # as it is
        last.clone()
        F.conv2d(F.conv2d(last, weight), weight)
        F.conv2d(x, weight)
        with pytest.raises(RuntimeError, match="meta"):
            x.sum().item()
        with pytest.raises(AssertionError):
            x + torch.zeros(2, 16, 6, 7)
    shape = (2, 16, 6, 7)
    assert traced.layout_copies == [("clone", shape), ("clone", shape), ("convolution", shape)]
