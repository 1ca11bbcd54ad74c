import logging
import pickle
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from fvcore.common.checkpoint import _IncompatibleKeys

from sasa_det.checkpoint import Checkpointer, CheckpointError
from sasa_det.checkpoint.matching import check_filled
from sasa_det.checkpoint.prefixes import named_as

MODEL = [
    "pixel_mean",
    "backbone.fpn_lateral3.weight",
    "backbone.bottom_up.stem.conv1.weight",
    "backbone.bottom_up.stem.conv1.norm.num_batches_tracked",
    "backbone.bottom_up.res2.weight",
    "head.cls_score.weight",
    "head.cls_score.bias",
    "head.anchor_generator.cell_anchors.0",
]
OPTIONAL = [key for key in MODEL if re.search("pixel_mean|tracked|anchors", key)]
NEEDED = [key for key in MODEL if key not in OPTIONAL]
BACKBONE = [key for key in NEEDED if "bottom_up" in key]

ALLOW = r"allow \(MODEL.WEIGHTS_ALLOW, or train.weights_allow in a LazyConfig\)"


def check(found, mismatched=(), model=MODEL, **options):
    weights = [key for key in found if key not in mismatched]
    missing = [key for key in model if key not in found]
    incompatible = _IncompatibleKeys(missing, [], [(key, (1,), (2,)) for key in mismatched])
    check_filled(model, weights, incompatible, **{"strict": False, **options})


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_that_fills_all(strict):
    check(MODEL, strict=strict)
    check(NEEDED, strict=strict)
    check([*MODEL, "more.weight"], strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("found", [[], ["fc.weight"], ["bottom_up.res2.weight"]])
def test_a_file_that_fills_nothing(found, strict):
    with pytest.raises(CheckpointError, match=f"none of its {len(found)} weights"):
        check(found, strict=strict, allow=["*"])


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_of_other_shapes_alone(strict):
    with pytest.raises(CheckpointError, match=r"other shapes: head.cls_score.bias, .* and 2 more"):
        check(NEEDED, NEEDED[::-1], strict=strict, allow=["*"])


def test_a_backbone_needs_no_head():
    check(BACKBONE)
    check([*BACKBONE, "backbone.bottom_up.linear.weight"])
    with pytest.raises(CheckpointError, match=r"has no backbone.fpn_lateral3.weight"):
        check(BACKBONE, strict=True)


def test_a_backbone_has_to_be_whole():
    with pytest.raises(CheckpointError, match=r"^it has no backbone.bottom_up.stem.conv1.weight;"):
        check(BACKBONE[1:])
    with pytest.raises(CheckpointError, match=r"^it has other shapes for backbone.bottom_up.res2"):
        check(BACKBONE, ["backbone.bottom_up.res2.weight"])


@pytest.mark.parametrize("key", [key for key in NEEDED if key not in BACKBONE])
def test_a_detector_has_to_be_whole(key):
    with pytest.raises(CheckpointError, match=f"^it has no {key}; .*named in {ALLOW},"):
        check([k for k in NEEDED if k != key])
    with pytest.raises(CheckpointError, match=f"^it has other shapes for {key}; .*{ALLOW}"):
        check(NEEDED, [key])


def test_without_an_fpn_the_backbone_is_all_of_it():
    model = ["backbone.res2.weight", "backbone.res3.weight", "head.weight"]
    check(model[:2], model=model)
    with pytest.raises(CheckpointError, match="has no backbone.res3.weight"):
        check(model[:1], model=model)


def test_a_model_without_a_backbone_has_to_be_whole():
    with pytest.raises(CheckpointError, match="has no b"):
        check(["a"], model=["a", "b"])


def test_what_is_allowed_by_name():
    check(NEEDED, ["head.cls_score.weight", "head.cls_score.bias"], allow=["head.cls_score.*"])
    check(NEEDED[:-2], allow=["head.cls_score.*"])
    with pytest.raises(CheckpointError, match=r"^it has no head.cls_score.bias, head.cls_score.w"):
        check(NEEDED[:-2], strict=True, allow=["head.cls_score.*"])
    with pytest.raises(CheckpointError, match=r"^it has other shapes for head.cls_score.bias"):
        check(NEEDED, ["head.cls_score.bias"], allow=["*.weight"])


def test_the_advice_is_what_helps():
    with pytest.raises(CheckpointError) as refusal:
        check(NEEDED, NEEDED[-2:])
    pattern = re.search(r"as in \"\['(.*)'\]\"", str(refusal.value))[1]
    check(NEEDED, NEEDED[-2:], allow=[pattern])


def test_a_pattern_that_matches_nothing_is_a_mistake():
    with pytest.raises(CheckpointError, match=f"'haed.*' of {ALLOW} matches no weight"):
        check(MODEL, allow=["haed.*"])


def test_the_sentence_is_short_and_the_log_has_all(caplog):
    model = [f"backbone.{n}.weight" for n in range(100)]
    with pytest.raises(CheckpointError, match="and 96 more") as refusal, caplog.at_level("ERROR"):
        check(model[:1], model=model)
    assert len(str(refusal.value)) < 300
    assert all(f"{key}" in caplog.text for key in model[1:])


# --------------------------------------------------------------------- models of detectron2


def detector(arch, backbone, num_classes=5):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    if "fpn" in backbone:
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    torch.manual_seed(0)
    return build_model(cfg)


def retinanet(num_classes=5):
    return detector("RetinaNet", "build_retinanet_resnet_fpn_backbone", num_classes)


def caffe2_name(key):
    """Name a weight of detectron2's ResNet as Caffe2 does."""
    stem = key.startswith("stem.")
    key = key.removeprefix("stem.").replace("shortcut", "branch1")
    if not stem:
        for number, letter in (("1", "a"), ("2", "b"), ("3", "c")):
            key = key.replace(f"conv{number}", f"branch2{letter}")
    for ours, theirs in ((".norm.weight", "_bn_s"), (".norm.bias", "_bn_b"), (".weight", "_w")):
        if key.endswith(ours):
            key = key.removesuffix(ours) + theirs
            break
    return ("res_" if stem and "bn" in key else "") + key.replace(".", "_")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A ResNet-50 as detectron2's zoo has it: a pickle with Caffe2's names, norms folded."""
    backbone = detector("RetinaNet", "build_retinanet_resnet_fpn_backbone").backbone.bottom_up
    weights = {
        caffe2_name(key): torch.randn(weight.shape).numpy()
        for key, weight in backbone.state_dict().items()
        if "running" not in key
    }
    assert "res2_0_branch2a_bn_s" in weights and "res_conv1_bn_b" in weights
    weights["pred_w"] = torch.ones(10, 256).numpy()
    path = tmp_path_factory.mktemp("imagenet") / "R-50.pkl"
    path.write_bytes(pickle.dumps(weights, protocol=2))
    return path


@pytest.mark.parametrize(
    ("arch", "backbone", "stage"),
    [
        ("RetinaNet", "build_retinanet_resnet_fpn_backbone", "backbone.bottom_up.res5"),
        ("GeneralizedRCNN", "build_resnet_backbone", "roi_heads.res5"),
    ],
)
def test_an_imagenet_backbone_of_the_zoo(imagenet, tmp_path, arch, backbone, stage):
    model = detector(arch, backbone)
    Checkpointer(model).load(str(imagenet))
    with open(imagenet, "rb") as file:
        weights = pickle.load(file)
    expected = weights["res5_1_branch2b_w"]
    assert model.state_dict()[f"{stage}.1.conv2.weight"].numpy().tobytes() == expected.tobytes()
    with pytest.raises(CheckpointError, match="R-50.pkl does not fit the model: it has no "):
        Checkpointer(model, strict=True).load(str(imagenet))
    # One weight less, or one of another shape, is no backbone for this model.
    lacking = {key: w for key, w in weights.items() if key != "res5_1_branch2b_w"}
    for bad, reason in (
        (lacking, "has no"),
        ({**weights, "res5_1_branch2b_w": expected[1:]}, "has other shapes for"),
    ):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(bad))
        with pytest.raises(CheckpointError, match=f"it {reason} {stage}.1.conv2.weight;"):
            Checkpointer(model).load(str(tmp_path / "bad.pkl"))


def test_a_detector_of_other_classes(tmp_path):
    torch.save({"model": retinanet(80).state_dict()}, tmp_path / "coco.pth")
    model = retinanet(5)
    with pytest.raises(CheckpointError, match="other shapes for head.cls_score.bias") as refusal:
        Checkpointer(model).load(str(tmp_path / "coco.pth"))
    pattern = re.search(r"as in \"\['(.*)'\]\"", str(refusal.value))[1]
    Checkpointer(model, allow=[pattern]).load(str(tmp_path / "coco.pth"))
    Checkpointer(retinanet(80), strict=True).load(str(tmp_path / "coco.pth"))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_are_matched_by_their_ends_on_request(tmp_path, prefix):
    model = retinanet()
    weights = {key: w + 1 for key, w in model.backbone.bottom_up.state_dict().items()}
    path = str(tmp_path / "backbone.pth")
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"none of its .*\?matching_heuristics=True"):
        Checkpointer(model).load(path)
    Checkpointer(model).load(path + "?matching_heuristics=True")
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, weights["stem.conv1.weight"])
    # From a model that was trained on several GPUs.
    full = {prefix + "backbone.bottom_up." + key: w + 2 for key, w in weights.items()}
    torch.save(full, path)
    Checkpointer(model).load(path)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, weights["stem.conv1.weight"] + 2)


def test_names_that_could_be_several(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="the names of its weights are ambiguous"):
        Checkpointer(model).load(f"{tmp_path}/a.pth?matching_heuristics=True")


def test_weights_that_are_too_many_are_told(tmp_path, caplog):
    model = torch.nn.Linear(2, 2)
    torch.save({**model.state_dict(), "fc.weight": torch.ones(2)}, tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING):
        Checkpointer(model, strict=True).load(str(tmp_path / "a.pth"))
    assert "fc.weight" in caplog.text


def test_names_that_differ_by_wrappers_and_a_prefix():
    weight = torch.zeros(1)
    model = ["backbone.a", "head._orig_mod.b"]
    assert named_as(model, {"module.backbone._orig_mod.a": weight, "module.x": weight}) == {
        "backbone.a": weight,
        "x": weight,
    }
    assert list(named_as(model, {"head._orig_mod.b": weight})) == ["head._orig_mod.b"]
    assert list(named_as(model, {"other.a": weight, "other.b": weight})) == ["other.a", "other.b"]
    with pytest.raises(CheckpointError, match="differ in their names by a wrapper"):
        named_as(model, {"a": weight, "_orig_mod.a": weight})
