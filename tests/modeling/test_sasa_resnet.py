"""Attention ResNets: shapes, names, and equality with detectron2's where they are convolutional."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import build_resnet_backbone

import sasa_det  # noqa: F401
from sasa_det import add_sasa_config
from sasa_det.layers import AttentionStem, LocalSelfAttention2d
from sasa_det.modeling import SASAResNet


def config(**sasa):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    cfg.MODEL.SASA.update(sasa)
    return cfg


def test_where_convolutions_stride_is_no_question_of_attention():
    cfg = config(WIDTH_MULTIPLIER=0.25)
    expected = str(build_backbone(cfg))
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True  # as by default
    assert str(build_backbone(cfg)) == expected


@pytest.mark.parametrize("depth,blocks", [
    (26, [1, 2, 4, 1]), (38, [2, 3, 5, 2]), (50, [3, 4, 6, 3]),
    (101, [3, 4, 23, 3]), (152, [3, 8, 36, 3]),
])  # fmt: skip
def test_depth_is_the_number_of_layers(depth, blocks):
    model = SASAResNet(depth=depth, width_multiplier=0.25)
    assert [len(stage) for stage in model.stages] == blocks
    assert depth == 2 + 3 * sum(blocks)
    assert sum(isinstance(m, LocalSelfAttention2d) for m in model.modules()) == sum(blocks)


@pytest.mark.parametrize("stem", ["attention", "convolution"])
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 97)])
def test_odd_sizes_round_up_at_every_stage(stem, size):
    model = build_backbone(config(STEM=stem, WIDTH_MULTIPLIER=0.25)).eval()
    outputs = model(torch.randn(1, 3, *size))
    shapes = model.output_shape()
    for name, output in outputs.items():
        spec = shapes[name]
        height, width = (-(-side // spec.stride) for side in size)
        assert output.shape == (1, spec.channels, height, width), name
    assert [spec.channels for spec in shapes.values()] == [16, 64, 128, 256, 512]


def test_without_attention_it_is_detectron2s_resnet():
    cfg = config(STEM="convolution", ATTENTION_STAGES=[])
    torch.manual_seed(0)
    ours = build_backbone(cfg).eval()
    theirs = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = ours.double(), theirs.double()  # products and convolutions round differently
    x = torch.randn(1, 3, 75, 64).double()
    with torch.no_grad():
        for mine, other in zip(ours(x).values(), theirs(x).values(), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("stages", [[], ["res5"], ["res3", "res4"]])
def test_any_set_of_stages_is_attentional(stages):
    model = build_backbone(config(ATTENTION_STAGES=stages, WIDTH_MULTIPLIER=0.25))
    found = {
        name.split(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, LocalSelfAttention2d)
    }
    assert found == set(stages)
    convolutions = {
        name.split(".")[0]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1)
    }
    assert convolutions == {"res2", "res3", "res4", "res5"} - set(stages)


def test_options_reach_every_layer():
    sasa = {"KERNEL_SIZE": 5, "NUM_HEADS": 4, "CONTENT": False, "BORDER": "zero"}
    model = build_backbone(config(**sasa, BACKEND="reference", WIDTH_MULTIPLIER=0.25))
    layers = [m for m in model.modules() if isinstance(m, LocalSelfAttention2d)]
    assert len(layers) == 16
    for layer in layers:
        assert (layer.kernel_size, layer.num_heads, layer.content) == (5, 4, False)
        assert (layer.border, layer.backend) == ("zero", "reference")
    stem = build_backbone(config(STEM_VALUES="pointwise", STEM_HEADS=8, STEM_RELATIVE=False)).stem
    assert isinstance(stem, AttentionStem)
    assert (stem.values, stem.num_heads, stem.rel_rows) == ("pointwise", 8, None)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_without_residuals_every_block_is_its_shortcut(norm):
    cfg = config(WIDTH_MULTIPLIER=0.25, ATTENTION_STAGES=["res2", "res5"], RESIDUAL_INIT=0.0)
    cfg.MODEL.RESNETS.NORM = norm
    model = build_backbone(cfg).eval()
    with torch.no_grad():
        features = model(torch.rand(1, 3, 64, 64))
        expected = features["stem"]
        for name, stage in zip(["res2", "res3", "res4", "res5"], model.stages, strict=True):
            expected = stage[0].shortcut(expected).relu()
            assert (features[name] - expected).abs().max() <= 1e-6 * expected.max(), name


def test_residuals_start_at_the_weight_of_their_last_norm():
    model = build_backbone(config(WIDTH_MULTIPLIER=0.25, RESIDUAL_INIT=0.25))
    last = {
        id(block.conv3.norm): block.conv3.norm.weight for stage in model.stages for block in stage
    }
    assert len(last) == 16 and all((weight == 0.25).all() for weight in last.values())
    others = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    others = [m for m in others if id(m) not in last]
    assert others and all((m.weight == 1).all() for m in others)


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN", "SyncBN", "nnSyncBN", "naiveSyncBN"])
def test_norms_of_detectron2(norm):
    # Group norm has 32 groups: full width.
    cfg = config(ATTENTION_STAGES=["res2", "res3"])
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.DEPTH = 26
    model = build_backbone(cfg).train()
    sum(x.mean() for x in model(torch.randn(2, 3, 40, 40)).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
def test_freeze_at(freeze_at):
    cfg = config(WIDTH_MULTIPLIER=0.25)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    model = build_backbone(cfg)
    for number, name in enumerate(["stem", "res2", "res3", "res4", "res5"], start=1):
        frozen = number <= freeze_at
        module = getattr(model, name)
        assert all(p.requires_grad != frozen for p in module.parameters()), name
        norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert bool(norms) != frozen, name
        assert any(isinstance(m, FrozenBatchNorm2d) for m in module.modules()) == frozen, name


def test_classifier():
    model = SASAResNet(depth=26, num_classes=7, width_multiplier=0.25)
    assert model(torch.randn(2, 3, 32, 32))["linear"].shape == (2, 7)


@pytest.mark.parametrize("change,message", [
    ({"SASA.KERNEL_SIZE": 6}, "kernel_size must be odd and at least 1, got 6"),
    ({"SASA.NUM_HEADS": 7}, "out_channels 64 must be a multiple of num_heads 7"),
    ({"SASA.ATTENTION_STAGES": ["res6"]}, "ATTENTION_STAGES.* must be one of .*got 'res6'"),
    ({"SASA.STEM": "conv"}, "MODEL.SASA.STEM.* must be one of .*got 'conv'"),
    ({"SASA.WIDTH_MULTIPLIER": 0.3}, "MODEL.SASA.WIDTH_MULTIPLIER.* must scale 64"),
    ({"SASA.RESIDUAL_INIT": -0.5}, "MODEL.SASA.RESIDUAL_INIT.* must be at least 0.*got -0.5"),
    ({"RESNETS.DEPTH": 18}, "MODEL.RESNETS.DEPTH.* must be one of .*got 18"),
    ({"RESNETS.OUT_FEATURES": ["res1"]}, "OUT_FEATURES.* must be one of .*got 'res1'"),
    ({"RESNETS.NUM_GROUPS": 32}, "MODEL.RESNETS.NUM_GROUPS must be 1 .*got 32"),
    (
        {"RESNETS.STRIDE_IN_1X1": True, "SASA.ATTENTION_STAGES": ["res5"]},
        "MODEL.RESNETS.STRIDE_IN_1X1 must be False .*(res2, res3, res4).*got True",
    ),
])  # fmt: skip
def test_bad_values_are_named(change, message):
    cfg = config()
    for key, value in change.items():
        node, name = key.split(".")
        cfg.MODEL[node][name] = value
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)
