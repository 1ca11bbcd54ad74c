"""Attentional FPN and heads: what they are made of and what they compute."""

import math
from functools import partial

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, RetinaNet, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

import sasa_det  # noqa: F401
from sasa_det.engine import load_config
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.modeling import AttentionFPN, AttentionRetinaNetHead, SASAResNet
from sasa_det.modeling.backbone import LastLevelP6P7Attention
from sasa_det.modeling.pointwise import PointwiseConv2d

ATTENTION = {"kernel_size": 3, "num_heads": 4}


def make_head(**options):
    options = {"num_classes": 3, "num_anchors": 2, "conv_dims": [32, 32], **options}
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]
    return AttentionRetinaNetHead(input_shape=shapes, attention=ATTENTION, **options)


def test_head_shapes():
    head = make_head()
    logits, deltas = head([torch.randn(2, 32, 5, 7), torch.randn(2, 32, 3, 4)])
    assert [x.shape for x in logits] == [(2, 6, 5, 7), (2, 6, 3, 4)]
    assert [x.shape for x in deltas] == [(2, 8, 5, 7), (2, 8, 3, 4)]


@pytest.mark.parametrize("norm,shared", [("", True), ("GN", True), ("BN", False)])
def test_weights_are_shared_over_levels_and_batch_statistics_are_not(norm, shared):
    torch.manual_seed(0)
    head = make_head(norm=norm)
    x = torch.randn(2, 32, 5, 7)
    head.train()
    head([x, 3 * x])
    head.eval()
    logits, deltas = head([x, x])
    assert torch.equal(logits[0], logits[1]) == shared
    assert torch.equal(deltas[0], deltas[1]) == shared


def test_initial_weights_and_prior():
    torch.manual_seed(0)
    head = AttentionRetinaNetHead(
        input_shape=[ShapeSpec(channels=256, stride=8)],
        num_classes=80, num_anchors=9, conv_dims=[256] * 4, prior_prob=0.02,
    )  # fmt: skip
    layers = [m for m in head.modules() if isinstance(m, LocalSelfAttention2d)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.value.weight.std().item() == pytest.approx(0.01, rel=0.05)
    with torch.no_grad():
        logits, _ = head([torch.randn(1, 256, 6, 6)])
    torch.testing.assert_close(
        logits[0].sigmoid(), torch.full_like(logits[0], 0.02), rtol=0.01, atol=0
    )
    assert head.cls_score[-1].bias[0].item() == pytest.approx(-math.log(0.98 / 0.02))


def kernel_sizes(module):
    return {m.kernel_size for m in module.modules() if isinstance(m, torch.nn.Conv2d)}


def test_prediction_is_attention_and_the_pointwise_layer_that_mixes_heads():
    kinds = [type(m) for m in make_head().cls_score]
    assert kinds == [LocalSelfAttention2d, PointwiseConv2d]
    mixing = make_head(mixing_layer=True).bbox_pred
    assert [type(m) for m in mixing] == [LocalSelfAttention2d, PointwiseConv2d, PointwiseConv2d]
    assert mixing[1].weight.shape == (32, 32, 1, 1)
    assert kernel_sizes(make_head(mixing_layer=True)) == {(1, 1)}


def test_attention_fpn_has_no_spatial_convolution_and_equals_its_formula():
    torch.manual_seed(0)
    bottom_up = SASAResNet(
        depth=26, width_multiplier=0.25, attention=ATTENTION, out_features=["res4", "res5"]
    )
    top_block = LastLevelP6P7Attention(32, 32, "p5", ATTENTION)
    fpn = AttentionFPN(bottom_up, ["res4", "res5"], 32, top_block=top_block, attention=ATTENTION)
    fpn.eval()
    assert kernel_sizes(fpn) == {(1, 1)}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, output = bottom_up(x), fpn(x)
        p5 = fpn.fpn_lateral5(features["res5"])
        p4 = fpn.fpn_lateral4(features["res4"])
        p4 = p4 + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = {"p4": fpn.fpn_output4(p4), "p5": fpn.fpn_output5(p5)}
        expected["p6"] = top_block.p6(expected["p5"])
        expected["p7"] = top_block.p7(expected["p6"].relu())
    assert list(output) == ["p4", "p5", "p6", "p7"]
    for name, feature in expected.items():
        torch.testing.assert_close(output[name], feature)
    shapes = fpn.output_shape()
    assert [(s.channels, s.stride) for s in shapes.values()] == [
        (32, 16), (32, 32), (32, 64), (32, 128)
    ]  # fmt: skip
    assert [tuple(x.shape[2:]) for x in output.values()] == [(4, 6), (2, 3), (1, 2), (1, 1)]


def test_fpn_norm_follows_the_attention():
    bottom_up = SASAResNet(depth=26, width_multiplier=0.25, out_features=["res4", "res5"])
    fpn = AttentionFPN(bottom_up, ["res4", "res5"], 32, norm="GN", attention=ATTENTION)
    kinds = [type(m) for m in fpn.fpn_output5]
    assert kinds == [LocalSelfAttention2d, torch.nn.GroupNorm]


@pytest.mark.parametrize("fpn,head", [
    ("attention", "attention"), ("convolution", "attention"), ("attention", "convolution"),
    ("convolution", "convolution"),
])  # fmt: skip
@pytest.mark.parametrize("norm", ["GN", ""])
def test_fpn_and_head_are_chosen_apart(fpn, head, norm):
    cfg = load_config(
        "configs/Quick/retinanet_SASA.yaml",
        ["MODEL.SASA.FPN", fpn, "MODEL.SASA.HEAD", head, "MODEL.RETINANET.NORM", norm],
    )
    model = build_model(cfg)
    assert isinstance(model.backbone, FPN)
    assert isinstance(model.backbone, AttentionFPN) == (fpn == "attention")
    assert isinstance(model.backbone.top_block, LastLevelP6P7Attention) == (fpn == "attention")
    expected = AttentionRetinaNetHead if head == "attention" else RetinaNetHead
    assert type(model.head) is expected
    norms = [m for m in model.head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == (2 if norm else 0)


@pytest.mark.parametrize("key,message", [
    ("MODEL.SASA.FPN", "MODEL.SASA.FPN must be one of .*got 'dense'"),
    ("MODEL.SASA.HEAD", "MODEL.SASA.HEAD must be one of .*got 'dense'"),
    ("MODEL.SASA.TOP_BLOCK_IN_FEATURE", "TOP_BLOCK_IN_FEATURE must be one of .*got 'dense'"),
])  # fmt: skip
def test_bad_values_are_named(key, message):
    with pytest.raises(ValueError, match=message):
        build_model(load_config("configs/Quick/retinanet_SASA.yaml", [key, "dense"]))


def test_losses_are_those_of_retinanet():
    model = build_model(
        load_config("configs/Quick/retinanet_SASA.yaml", ["MODEL.RETINANET.NUM_CLASSES", 3])
    )
    anchors = [Boxes(torch.rand(12, 4) * 20 + torch.tensor([0.0, 0.0, 20.0, 20.0]))]
    labels = [torch.arange(12) % 5 - 1, torch.full((12,), 3)]
    boxes = [torch.rand(12, 4) * 20 + torch.tensor([0.0, 0.0, 20.0, 20.0]) for _ in labels]
    logits, deltas = torch.randn(2, 12, 3), torch.randn(2, 12, 4)
    results = []
    for losses in (model.losses, partial(RetinaNet.losses, model)):
        leaves = [x.clone().requires_grad_() for x in (logits, deltas)]
        model.loss_normalizer = 100
        with EventStorage() as storage:
            values = losses(anchors, [leaves[0]], labels, [leaves[1]], boxes)
        gradients = torch.autograd.grad(sum(values.values()), leaves)
        assert storage.latest()["num_pos_anchors"][0] == 7 / 2
        results.append((values, gradients, model.loss_normalizer))
    torch.testing.assert_close(*results)
