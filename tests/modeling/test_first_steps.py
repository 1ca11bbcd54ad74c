"""What a model says to somebody who takes its first steps in another project."""

import copy
import logging

import pytest
import torch
from detectron2 import config as detectron2_config
from detectron2 import model_zoo
from detectron2.modeling import FPN, build_backbone, build_model
from detectron2.modeling.backbone import fpn, resnet
from detectron2.structures import pairwise_iou
from detectron2.utils.analysis import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

import sasa_det
from sasa_det import model_zoo as sasa_zoo
from sasa_det.data.images import read_image
from sasa_det.errors import UsageError
from sasa_det.modeling import SASAResNet
from sasa_det.ops.flops import fvcore_handles

# Of a model that is traced.
_OPERATORS = ("local_attention", "block_attention", "mixed_values")


def small(*opts):
    cfg = sasa_det.get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_backbone"
    cfg.MODEL.DEVICE = "cpu"
    options = ["MODEL.RESNETS.DEPTH", 26, "MODEL.SASA.WIDTH_MULTIPLIER", 0.25]
    cfg.merge_from_list([*options, "MODEL.BACKBONE.FREEZE_AT", 0, *opts])
    return cfg


@pytest.mark.parametrize(
    "key, name",
    [
        ("MODEL.BACKBONE.NAME", "build_sasa_resnet_backbone"),
        ("MODEL.BACKBONE.NAME", "build_sasa_resnet_fpn_backbone"),
        ("MODEL.BACKBONE.NAME", "build_retinanet_san_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE", "AttentionRetinaNet"),
        ("MODEL.META_ARCHITECTURE", "Classifier"),
    ],
)
def test_a_config_without_the_keys_is_refused_with_what_to_call(key, name):
    cfg = detectron2_config.get_cfg()
    cfg.merge_from_list([key, name, "MODEL.DEVICE", "cpu"])
    with pytest.raises(UsageError, match=r"has no MODEL.SASA: make it with sasa_det.get_cfg\(\)"):
        build_model(cfg)


def test_get_cfg_reads_the_configs_of_both_projects():
    cfg = sasa_det.get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.merge_from_file("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml")
    assert cfg.MODEL.SASA.HEAD == "attention"


@pytest.mark.parametrize("freeze_at, norm", [(0, "FrozenBN"), (5, "BN"), (2, "FrozenBN")])
def test_frozen_norms_without_statistics_are_warned_of_once(freeze_at, norm, caplog):
    options = ["MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at]
    backbone = build_backbone(small(*options))
    with caplog.at_level(logging.WARNING, "sasa_det"):
        backbone.eval()(torch.zeros(1, 3, 32, 32))
        assert not caplog.records
        for _ in range(2):
            backbone.train()(torch.zeros(1, 3, 32, 32))
    (record,) = caplog.records
    assert "do not normalize" in record.message and "MODEL.RESNETS.NORM" in record.message


@pytest.mark.parametrize("kind", ["statistics", "trained"])
def test_norms_that_normalize_are_not_warned_of(kind, caplog):
    frozen = ["MODEL.RESNETS.NORM", "FrozenBN"] if kind == "statistics" else []
    backbone = build_backbone(small(*(frozen or ["MODEL.RESNETS.NORM", "BN"]))).train()
    for name, buffer in backbone.named_buffers():
        if frozen and name.endswith("running_mean"):  # as weights that are loaded later
            buffer.fill_(0.1)
    with caplog.at_level(logging.WARNING, "sasa_det"):
        backbone(torch.zeros(2, 3, 64, 64))
    assert not caplog.records


def test_detectron2s_counter_counts_attention_with_the_handles():
    cfg = small("MODEL.RESNETS.NORM", "BN")
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_retinanet_sasa_resnet_fpn_backbone"])
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "AttentionRetinaNet"])
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]])
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]])
    cfg.merge_from_list(["MODEL.RETINANET.NUM_CONVS", 1])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = torch.rand(3, 64, 64) * 255
    inputs = [{"image": image, "height": 64, "width": 64}]

    def count(**handles):
        flops = FlopCountAnalysis(model, (inputs,)).set_op_handle(**handles)
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return flops.by_operator()

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    ours = {name: value for name, value in count(**fvcore_handles()).items() if name in _OPERATORS}
    expected = {
        str(op).removeprefix("sasa_det."): flops // 2  # torch counts 2 for a multiply-add
        for op, flops in counter.get_flop_counts()["Global"].items()
        if str(op).startswith("sasa_det.")
    }
    assert ours and ours == expected
    assert not any(count()[name] for name in _OPERATORS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_finds_what_it_finds_in_float32(dtype):
    model = sasa_zoo.get("Digits/retinanet_SASA.yaml", trained=True, device="cpu").eval()
    (image,) = sasa_zoo.get_sample_images("Digits/retinanet_SASA.yaml")[:1]
    image = torch.from_numpy(read_image(image, 10**6, "BGR").copy()).permute(2, 0, 1)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected, found = (m([{"image": image}])[0]["instances"] for m in (model, half))
    expected, found = (each[each.scores > 0.5] for each in (expected, found))
    assert len(expected) > 0 and found.scores.dtype == torch.float32
    assert sorted(found.pred_classes.tolist()) == sorted(expected.pred_classes.tolist())
    iou = pairwise_iou(expected.pred_boxes, found.pred_boxes)
    assert (iou.max(1).values > 0.9).all()
    with pytest.raises(ValueError, match=f"the type of its weights, {dtype}, got torch.float32"):
        half([{"image": image.float()}])


def test_an_fpn_of_another_project_stands_on_our_resnet():
    """With detectron2's own builder, which calls build_resnet_backbone as those of others do."""
    cfg = small(
        "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]
    )
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SASA.BUILDER = (
        "build_other_backbone_with_sasa_resnet",
        "build_resnet_fpn_backbone",
    )
    backbone = build_backbone(cfg)
    assert type(backbone) is FPN and type(backbone.bottom_up) is SASAResNet
    assert backbone(torch.zeros(2, 3, 64, 64))["p5"].shape == (2, 256, 2, 2)
    # And only for this call.
    assert fpn.build_resnet_backbone is resnet.build_resnet_backbone
    for name, message in {
        "build_resnet_fpn_backbon": "got 'build_resnet_fpn_backbon'; did you mean",
        "build_san_backbone": "does not call build_resnet_backbone",
    }.items():
        cfg.MODEL.SASA.BUILDER = name
        with pytest.raises(UsageError, match=message):
            build_backbone(cfg)
