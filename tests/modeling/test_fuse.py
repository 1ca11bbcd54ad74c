"""A fused model computes what its model computes, without batch norms."""

import pytest
import torch
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from torch import nn

from sasa_det.engine import Trainer, load_config
from sasa_det.layers import AttentionStem
from sasa_det.modeling import fuse

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, CycleBatchNormList)
BN = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.RETINANET.NORM", "BN"]
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", ""]
MODELS = {
    "attention": ("configs/Digits/retinanet_SASA.yaml", []),
    "convolution": ("configs/Digits/retinanet_conv.yaml", []),
    "50 layers": ("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml", BN),
    "convolutional stem": ("configs/COCO-Detection/retinanet_SASA_R_50_convstem_full.yaml", FROZEN),
    "detectron2's, BN": ("configs/COCO-Detection/retinanet_R_50.yaml", BN),
    "detectron2's, frozen": ("configs/COCO-Detection/retinanet_R_50.yaml", FROZEN),
}


def build(file, *opts):
    """Build a model whose norms have statistics, scales and shifts that matter."""
    cfg = load_config(file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, NORMS) and getattr(module, "weight", None) is not None:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model


@torch.no_grad()
def outputs(model, images):
    features = model.backbone(images)
    heads = model.head([features[name] for name in model.head_in_features])
    return [*features.values(), *(x for level in heads for x in level)]


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def norms_of(model):
    """Name the batch norms that are called; the stem's operator takes its norm as numbers."""
    stems = {id(m.norm) for m in model.modules() if isinstance(m, AttentionStem)}
    return [n for n, m in model.named_modules() if isinstance(m, NORMS) and id(m) not in stems]


@pytest.mark.parametrize("kind", MODELS)
def test_computes_the_same_without_norms(kind):
    file, opts = MODELS[kind]
    model = build(file, *opts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    images = torch.randn(2, 3, 96, 160)
    assert_close(outputs(fused, images), outputs(model, images))
    assert norms_of(model) and not norms_of(fused)
    assert not any(p.requires_grad for p in fused.parameters()) and not fused.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Neither takes the other's weights for its own.
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(fused.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(model.state_dict())


def test_a_classifier_computes_the_same():
    model = build("configs/Digits/classifier_SASA.yaml")
    images = torch.rand(3, 3, 64, 64) * 255
    with torch.no_grad():
        assert_close([fuse(model).logits(images)], [model.logits(images)])


def test_zeros_outside_the_image_keep_the_norm():
    """There the attention weights of the pixels inside do not sum to 1."""
    model = build("configs/Digits/retinanet_SASA.yaml", "MODEL.SASA.BORDER", "zero")
    fused = fuse(model)
    images = torch.randn(1, 3, 64, 64)
    assert_close(outputs(fused, images), outputs(model, images))
    assert any(".attention" not in name for name in norms_of(fused))


def test_hooks_of_a_layer_still_run():
    model = build("configs/Digits/retinanet_SASA.yaml")
    block, calls = model.backbone.bottom_up.res3[0], []
    block.norm.register_forward_hook(lambda *_: calls.append("norm"))
    block.conv1.register_forward_hook(lambda *_: calls.append("conv1"))
    images = torch.randn(1, 3, 64, 64)
    fused = fuse(model)
    calls.clear()
    found = outputs(fused, images)
    assert sorted(calls) == ["conv1", "norm"]
    assert_close(found, outputs(model, images))


def test_norms_without_running_statistics_are_kept():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fuse(model)(x), model(x))


def test_levels_have_hooks_of_their_own():
    model = build("configs/Digits/retinanet_SASA.yaml")
    fused, calls = fuse(model), []
    levels = fused.head.cls_subnet[0]
    levels[0].register_forward_hook(lambda *_: calls.append(1))
    outputs(fused, torch.randn(1, 3, 64, 64))
    assert len(levels) > 1 and len(calls) == 1
