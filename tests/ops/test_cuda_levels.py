"""Layers and RetinaNet's heads on all levels at once, with emulated kernels."""

import copy
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.layers.joined import attend_levels
from sasa_det.modeling import joined_head, retinanet
from sasa_det.modeling.joined_head import agreed, run_joined
from sasa_det.modeling.joined_norm import normalize_and_rectify
from sasa_det.modeling.retinanet import AttentionRetinaNetHead
from sasa_det.ops import cuda, level_norm_cuda
from sasa_det.ops.cuda_kernels import EMBEDDINGS_HEADER, KERNELS, Maps, Variant, embeddings_name
from sasa_det.ops.levels import join, multiply_levels, split

BF16 = torch.bfloat16
VARIANT = Variant(BF16, 32, 3)


@pytest.fixture(scope="module")
def library(emulate_kernels):
    headers = [*(kernel.header for kernel in KERNELS.values()), EMBEDDINGS_HEADER]
    structures = ("ForwardArguments", "QueryArguments", "KeyArguments")
    names = map(VARIANT.name, KERNELS)
    kernels = dict(zip(names, structures, strict=True))
    kernels[embeddings_name(VARIANT)] = "EmbeddingArguments"
    for name, (structure, _) in level_norm_cuda.KERNELS.items():
        kernels[level_norm_cuda.kernel_name(name, BF16)] = structure
    headers += [level_norm_cuda.HEADER, level_norm_cuda.FINISH_HEADER]
    return emulate_kernels(headers, kernels)


def make_features(channels, sizes=((5, 18), (3, 9), (1, 2)), batch=2, dtype=BF16):
    torch.manual_seed(1)
    return [torch.randn(batch, channels, *size).relu().to(dtype) for size in sizes]


def test_levels_are_joined_and_split():
    features = make_features(3)
    pixels, maps = join(features)
    assert maps == Maps(2, ((5, 18), (3, 9), (1, 2))) and maps.pixels == (180, 54, 4)
    assert torch.equal(pixels[180 + 27], features[1][1, :, 0, 0])
    for x, y in zip(features, split(pixels, maps), strict=True):
        assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)


def test_levels_of_no_images():
    pixels, maps = join([x[:0].requires_grad_() for x in make_features(3)])
    assert [x.shape for x in split(pixels, maps)] == [(0, 3, 5, 18), (0, 3, 3, 9), (0, 3, 1, 2)]
    layer = nn.Conv2d(3, 4, 1).to(BF16)
    outputs = multiply_levels(pixels, layer.weight, layer.bias, maps)
    assert [x.shape for x in outputs] == [(0, 4, 5, 18), (0, 4, 3, 9), (0, 4, 1, 2)]
    gradients = torch.autograd.grad(outputs, list(layer.parameters()), outputs)
    assert not any(x.any() for x in gradients)


def test_outputs_of_levels_may_be_changed_in_place():
    pixels, maps = join(make_features(6, dtype=torch.float64))
    layer = nn.Conv2d(6, 4, 1).double()
    first, second, third = multiply_levels(pixels, layer.weight, layer.bias, maps)
    kept = second.detach().clone()
    (gradient,) = torch.autograd.grad(2 * first.sigmoid_().sum(), layer.bias)
    assert torch.equal(second, kept) and first.max() < 1
    torch.testing.assert_close(
        gradient, (2 * first * (1 - first)).sum((0, 2, 3)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_levels_is_that_of_each(bias):
    features = make_features(6, dtype=torch.float64)
    pixels, maps = join(features)
    layer = nn.Conv2d(6, 4, 1, bias=bias).double()
    leaf = pixels.requires_grad_()
    outputs = multiply_levels(leaf, layer.weight, layer.bias, maps)
    expected = [layer(x) for x in split(leaf, maps)]
    grads = [torch.randn_like(x) for x in expected]
    inputs = [leaf, *layer.parameters()]
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad(outputs, inputs, grads),
        torch.autograd.grad(expected, inputs, grads),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # sums of levels are float32
    # What no loss sees has no gradient to give.
    (of_first,) = torch.autograd.grad(
        multiply_levels(leaf, layer.weight, None, maps)[0].sum(), leaf
    )
    assert of_first[:180].any() and not of_first[180:].any()


def test_a_layer_on_all_levels_is_the_layer_on_each(launched):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(24, 64, kernel_size=3, num_heads=2).to(BF16)
    features = [x.requires_grad_() for x in make_features(24)]
    pixels, maps = join(features)
    outputs = split(attend_levels(layer, pixels, maps), maps)
    assert [name.split("<")[0] for name in launched] == ["local_attention_forward"]
    expected = [layer(x) for x in features]
    grads = [torch.randn_like(x) for x in expected]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours, theirs)
    ours = torch.autograd.grad(outputs, features, grads)
    theirs = torch.autograd.grad(expected, features, grads)
    assert all(map(torch.equal, ours, theirs))


def make_head(norm="BN", **options):
    torch.manual_seed(0)
    attention = {"kernel_size": 3, "num_heads": 1}
    head = AttentionRetinaNetHead(
        input_shape=[ShapeSpec(channels=32)] * 3,
        num_classes=3,
        num_anchors=2,
        conv_dims=[32],
        norm=norm,
        attention=attention,
        **options,
    )
    for name, parameter in head.named_parameters():
        if "value" in name:  # small ones leave nothing of float32 behind a norm in bfloat16
            nn.init.normal_(parameter, std=32**-0.5)
    return head


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_norms_on_all_levels_are_the_norms_on_each(emulated, monkeypatch, training):
    monkeypatch.setattr(level_norm_cuda, "why_not", lambda x, pixels: None)
    head = make_head(norm="SyncBN" if training else "BN").train(training)
    norms = head.cls_subnet[0]["norms"]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    alone = copy.deepcopy(norms)
    features = [x.requires_grad_(training) for x in make_features(32)]
    pixels, maps = join(features)
    with torch.set_grad_enabled(training):
        outputs = split(normalize_and_rectify(pixels, norms, maps), maps)
    assert emulated == [
        f"level_norm_{x}" for x in ("moments", "finish", "apply")[-3 if training else -1 :]
    ]
    # SyncBatchNorm takes no tensors of CPUs.
    expected = [
        F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, eps=norm.eps
        ).relu()
        for x, norm in zip(features, alone, strict=True)
    ]
    results = [outputs, expected]
    if training:
        grads = [torch.randn_like(x) for x in expected]
        for result, module in zip(results, (norms, alone), strict=True):
            inputs = [*features, *module.parameters()]
            result += torch.autograd.grad(list(result), inputs, grads)
            result += [x for x in module.buffers() if x.dtype == torch.float32]
        assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1, 1]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()


@pytest.mark.parametrize(
    "options", [{}, {"norm": "", "mixing_layer": True}, {"norm": "GN"}], ids=str
)
def test_heads_on_all_levels_are_the_heads_on_each(launched, emulated, monkeypatch, options):
    monkeypatch.setattr(level_norm_cuda, "why_not", lambda x, pixels: None)
    head = make_head(**options).to(BF16)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    alone = copy.deepcopy(head)
    features = make_features(32)
    results = []
    for module in (head, alone):
        leaves = [x.clone().requires_grad_() for x in features]
        outputs = [x for levels in module(leaves) for x in levels]
        torch.manual_seed(2)
        grads = [torch.randn(x.shape).to(BF16) for x in outputs]
        inputs = [*leaves, *module.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
        # Of two towers of a layer and the layers that predict, on three levels.
        for kernel in KERNELS:
            count = sum(name.startswith(f"{kernel}<") for name in launched)
            assert count == (4 if module is head else 3 * 4)
        # Of their norms.
        if module is head:
            count = emulated.count("level_norm_gradient")
            assert count == (2 if options.get("norm", "BN") == "BN" else 0)
        launched.clear()
        monkeypatch.setattr(retinanet, "run_joined", lambda head, features: None)
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and theirs.any()
        # Sums over levels are rounded once, or for each of them.
        assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    for name, buffer in head.named_buffers():
        torch.testing.assert_close(buffer, alone.get_buffer(name))


def test_heads_with_more_than_weights_run_level_by_level(launched, monkeypatch):
    features = make_features(32)

    def is_run(change=lambda head: None, features=features):
        head = make_head().to(BF16)
        change(head)
        return run_joined(head, features) is not None

    assert is_run()
    assert not is_run(features=features[:1])
    assert not is_run(features=[features[0], features[1].double(), features[2]])
    assert not is_run(features=[features[0], features[1][:1], features[2]])
    assert not is_run(lambda head: head.cls_subnet.register_forward_hook(lambda *_: None))
    assert not is_run(lambda head: head.bbox_pred.register_forward_hook(lambda *_: None))
    assert not is_run(lambda head: head.bbox_pred[-1].register_forward_hook(lambda *_: None))
    assert not is_run(lambda head: head.bbox_pred[0].register_forward_hook(lambda *_: None))
    assert not is_run(lambda head: setattr(head.cls_score[0], "backend", "loop"))
    monkeypatch.setattr(joined_head, "runs_on_levels", lambda layer, x: x is not features[2])
    assert not is_run()


def test_maps_of_one_launch_are_counted():
    assert cuda.takes_maps(Maps(2, ((5, 6),) * 8), 8)
    assert not cuda.takes_maps(Maps(2, ((5, 6),) * 9), 8)
    # Rows of tiles of 8 pixels are a dimension of a grid, of 65,535 at most.
    assert cuda.takes_maps(Maps(1, ((8 * 65_534, 1), (8, 1))), 8)
    assert not cuda.takes_maps(Maps(1, ((8 * 65_534, 1), (9, 1))), 8)
    # What pixels have for each head is counted with 31 bits, with the rows beside an image.
    maps = Maps(2**12, ((2**8, 2**7), (2**8, 2**7)))
    assert cuda.takes_maps(maps, 4) and not cuda.takes_maps(maps, 5)


def test_processes_agree_whether_the_kernels_take_a_head():
    """Two, as threads with a group of gloo, of which one has a hook."""
    store, answers = torch.distributed.HashStore(), {}

    def process(rank):
        group = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        heads = [nn.Identity() for _ in range(2)]
        answers[rank] = [
            agreed(heads[0], rank == 0, group, torch.device("cpu")),
            agreed(heads[1], True, group, torch.device("cpu")),
            # They are not asked again.
            agreed(heads[0], True, group, torch.device("cpu")),
        ]
        with pytest.raises(RuntimeError, match="cannot any more in this one: hooks"):
            agreed(heads[1], False, group, torch.device("cpu"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert answers == {0: [False, True, False], 1: [False, True, False]}


def test_heads_whose_norms_share_statistics_need_kernels_for_them(launched, monkeypatch):
    features = make_features(32)
    head = make_head().to(BF16)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    monkeypatch.setattr(joined_head, "_group_of", lambda head: "a group")
    taken = []
    monkeypatch.setattr(level_norm_cuda, "why_not", lambda x, pixels: taken.append(x.shape))
    assert run_joined(head, features) is not None
    assert taken[:2] == 2 * [(2 * (5 * 18 + 3 * 9 + 2), 32)]
    monkeypatch.setattr(level_norm_cuda, "why_not", lambda x, pixels: "they differ")
    assert run_joined(head, features) is None
