import re

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from sasa_det.checkpoint import (
    Checkpointer,
    CheckpointError,
    convert_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sasa_det.config import add_sasa_config
from sasa_det.errors import TransferError

ALL = ["res2", "res3", "res4", "res5"]
DETECTORS = {
    "RetinaNet": ("AttentionRetinaNet", "build_retinanet_sasa_resnet_fpn_backbone"),
    "Faster R-CNN": ("GeneralizedRCNN", "build_sasa_resnet_fpn_backbone"),
    "Mask R-CNN": ("GeneralizedRCNN", "build_sasa_resnet_fpn_backbone"),
    "Faster R-CNN C4": ("GeneralizedRCNN", "build_sasa_resnet_backbone"),
}


def config(architecture, backbone, features, stages=ALL, **keys):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 5
    cfg.MODEL.RESNETS.DEPTH = 26
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    cfg.MODEL.SASA.ATTENTION_STAGES = stages
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.SASA.HEAD = "convolution"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def classifier(features=("linear",), **keys):
    return config("Classifier", "build_sasa_resnet_backbone", list(features), **keys)


def detector(name, **keys):
    if name.endswith("C4"):
        return config(*DETECTORS[name], ["res4"], **keys)
    cfg = config(*DETECTORS[name], ALL, **keys)
    cfg.MODEL.MASK_ON = name.startswith("Mask")
    cfg.MODEL.FPN.IN_FEATURES = ALL[1:] if name == "RetinaNet" else ALL
    if name != "RetinaNet":
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    return cfg


def built(cfg, seed=0):
    """Build a model with statistics of norms that are no defaults."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def saved(folder, model, **rest):
    write_checkpoint({"model": model.state_dict(), **rest}, folder / "source.pth")
    return folder / "source.pth"


# --------------------------------------------------------------------- of this project, to models


@pytest.mark.parametrize("reader", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_pretrained_backbone_gives_the_same_features(tmp_path, name, reader):
    is_c4 = name.endswith("C4")
    # detectron2's C4 models have res5 in the head, with convolutions in three blocks.
    keys = {"stages": ["res2", "res4"], "MODEL__RESNETS__DEPTH": 50} if is_c4 else {}
    pretrained = built(classifier(ALL + ["linear"], **keys))
    target = tmp_path / "backbone.pth"
    model = built(detector(name, **keys), seed=1)
    report = convert_checkpoint(saved(tmp_path, pretrained), target, model)
    assert not report.missing and not report.mismatched
    assert report.dropped == dict.fromkeys(
        ["backbone.linear.weight", "backbone.linear.bias"], "classifier"
    )
    rest = reader(model).load(str(target))
    assert rest["config"] == "" and "preprocessing" not in rest
    image = torch.randint(0, 256, (3, 64, 64)).float()
    bottom_up = model.backbone if is_c4 else model.backbone.bottom_up
    with torch.no_grad():
        given = pretrained.backbone((image[None] - pretrained.pixel_mean) / pretrained.pixel_std)
        found = bottom_up(model.preprocess_image([{"image": image}]).tensor)
        if is_c4:
            found["res5"] = model.roi_heads.res5(found["res4"])
    assert "res5" in found
    for feature, value in found.items():
        if is_c4 and feature == "res5":  # detectron2's convolutions round differently
            assert (value - given[feature]).abs().max() <= 1e-5 * value.max()
        else:
            assert torch.equal(value, given[feature])


def test_the_weights_are_the_source_s_bit_for_bit(tmp_path):
    pretrained = built(classifier())
    path = saved(tmp_path, pretrained)
    for name in ("a.pth", "b.pth", "a.safetensors", "b.safetensors"):
        convert_checkpoint(path, tmp_path / name, built(detector("RetinaNet")))
    for suffix in (".pth", ".safetensors"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        read = read_checkpoint(tmp_path / f"a{suffix}")
        weights = pretrained.backbone.state_dict()
        assert set(read["model"]) == {key for key in weights if not key.startswith("linear.")}
        assert all(torch.equal(weight, weights[key]) for key, weight in read["model"].items())
        model = built(detector("RetinaNet"), seed=1)
        Checkpointer(model).load(str(tmp_path / f"a{suffix}"))
        state = model.backbone.bottom_up.state_dict()
        assert all(torch.equal(weight, state[key]) for key, weight in read["model"].items())
    plain = torch.load(tmp_path / "a.pth", weights_only=True)
    assert plain["matching_heuristics"] is True


def test_a_pooled_classifier_and_back(tmp_path):
    pretrained = built(classifier(["res5"]))
    report = convert_checkpoint(saved(tmp_path, pretrained), tmp_path / "a.pth", pretrained)
    assert report.dropped == dict.fromkeys(["linear.weight", "linear.bias"], "classifier")
    # A classifier of other classes starts from it, whatever its head.
    for features in (["res5"], ["linear"]):
        model = built(classifier(features, MODEL__CLASSIFIER__NUM_CLASSES=7), seed=1)
        Checkpointer(model).load(str(tmp_path / "a.pth"))
        assert torch.equal(
            model.backbone.res5[0].conv3.weight, pretrained.backbone.res5[0].conv3.weight
        )


def test_of_a_detector_the_backbone_is_taken(tmp_path):
    trained = built(detector("RetinaNet"))
    model = built(classifier(["res5"]), seed=1)
    path = saved(tmp_path, trained, iteration=3, trainer={})
    report = convert_checkpoint(path, tmp_path / "a.pth", model)
    assert report.dropped["head.cls_score.weight"] == "outside the backbone"
    assert report.dropped["backbone.fpn_lateral3.weight"] == "outside the backbone"
    assert report.dropped["trainer"] == report.dropped["iteration"] == "state of training"
    assert len(report.loaded) == len(model.backbone.state_dict())
    assert {*report.loaded.values(), *report.dropped} == {
        *read_checkpoint(path)["model"],
        *("iteration", "trainer"),
    }
    # What was converted can be converted again.
    again = convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth", model)
    assert list(again.loaded) == list(report.loaded) and not again.dropped
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("name", ["RetinaNet", "Faster R-CNN C4"])
def test_a_classifier_that_was_not_converted_says_so(tmp_path, name):
    saved(tmp_path, built(classifier(stages=[], MODEL__SASA__STEM="convolution")))
    model = built(detector(name, stages=[], MODEL__SASA__STEM="convolution"))
    for path in ("source.pth", "source.pth?matching_heuristics=True"):
        with pytest.raises(
            CheckpointError, match="with sasa-det convert-checkpoint first"
        ) as error:
            Checkpointer(model).load(f"{tmp_path}/{path}")
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ what does not fit


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("source"), built(classifier()))


def without(source, *names, **others):
    """Write the weights of a file, some of them left out or changed, to another of its name."""
    weights = {k: w for k, w in read_checkpoint(source)["model"].items() if k not in names}
    path = source.parent / "changed" / source.name
    write_checkpoint({"model": {**weights, **others}}, path)
    return path


def test_a_weight_that_is_not_there(source, tmp_path):
    model = built(detector("RetinaNet"))
    key = "res4.1.attention.key.weight"
    path = without(source, f"backbone.{key}")
    with pytest.raises(TransferError, match=f"source.pth does not fit .*it has no {key};") as error:
        convert_checkpoint(path, tmp_path / "a.pth", model)
    assert "\n" not in str(error.value)
    assert error.value.report.missing == {key: "not in the source"}
    assert key in str(error.value.report)
    assert not any(tmp_path.iterdir())
    advised = re.search("as in --allow '(.*)'", str(error.value))[1]
    report = convert_checkpoint(path, tmp_path / "a.pth", model, allow=[advised])
    assert report.missing == {key: "not in the source"}
    # The file has to be taken as it is by name, too.
    with pytest.raises(CheckpointError, match=key):
        Checkpointer(model).load(str(tmp_path / "a.pth"))
    Checkpointer(model, allow=report.weights_allow).load(str(tmp_path / "a.pth"))


def test_a_weight_of_another_shape(source, tmp_path):
    model = built(detector("RetinaNet"))
    other = {"backbone.res5.0.conv3.weight": torch.ones(2, 3)}
    path = without(source, *other, **other)
    with pytest.raises(TransferError, match=r"other shapes for res5.0.conv3.weight \(\(2, 3\) in"):
        convert_checkpoint(path, tmp_path / "a.pth", model, allow=["res2.*"])
    report = convert_checkpoint(path, tmp_path / "a.pth", model, allow=["res5.0.conv3.weight"])
    assert list(report.mismatched) == ["res5.0.conv3.weight"]
    assert report.mismatched["res5.0.conv3.weight"][0] == "backbone.res5.0.conv3.weight"
    assert "res5.0.conv3.weight" not in read_checkpoint(tmp_path / "a.pth")["model"]


def test_patterns_have_to_match(source, tmp_path):
    with pytest.raises(CheckpointError, match="pattern 'ers5.*' of --allow matches no weight"):
        convert_checkpoint(
            source, tmp_path / "a.pth", built(classifier()), allow=["res5.*", "ers5.*"]
        )
    assert not any(tmp_path.iterdir())


def test_every_weight_is_in_one_place(source, tmp_path):
    model = built(classifier(MODEL__RESNETS__DEPTH=38))
    with pytest.raises(TransferError) as error:
        convert_checkpoint(source, tmp_path / "a.pth", model)
    report = error.value.report
    sources = [
        *report.loaded.values(),
        *report.dropped,
        *(n for n, _ in report.mismatched.values()),
    ]
    assert sorted(sources) == sorted(read_checkpoint(source)["model"])
    targets = [*report.loaded, *report.missing, *report.mismatched]
    state = [key for key in model.backbone.state_dict() if not key.startswith("linear.")]
    assert sorted(targets) == sorted(state)


@pytest.mark.parametrize(
    ("keys", "left", "patterns"),
    [
        ({"MODEL__SASA__POSITION": "none"}, "rel_cols", ["*.rel_*"]),
        ({"MODEL__SASA__CONTENT": False}, "attention.key.weight", ["*.attention.key.weight"]),
    ],
)
def test_what_the_target_has_no_place_for(source, tmp_path, keys, left, patterns):
    model = built(classifier(**keys))
    with pytest.raises(TransferError, match=f"the target has no place for .*{left}"):
        convert_checkpoint(source, tmp_path / "a.pth", model)
    report = convert_checkpoint(source, tmp_path / "a.pth", model, allow=patterns)
    assert any(left in name for name in report.dropped)


def test_deeper_into_shallower_is_refused_and_fewer_stages_are_not(tmp_path):
    deep = saved(tmp_path, built(classifier(MODEL__RESNETS__DEPTH=38)))
    with pytest.raises(TransferError, match=r"no place for .*res2\.1\."):
        convert_checkpoint(deep, tmp_path / "a.pth", built(classifier()))
    shallow = built(classifier(["res4"], MODEL__RESNETS__DEPTH=38))
    report = convert_checkpoint(deep, tmp_path / "a.pth", shallow)
    stages = {n.split(".")[1] for n, why in report.dropped.items() if why.startswith("no such sta")}
    assert stages == {"res5"}


def test_nothing_fits(source, tmp_path):
    other = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="none of its .* weights .* fits the target's"):
        convert_checkpoint(source, tmp_path / "a.pth", other, allow=["*"])


def test_a_layout_that_is_unknown(tmp_path):
    write_checkpoint({"model": {"features.0.weight": torch.ones(1)}}, tmp_path / "vgg.pth")
    with pytest.raises(
        CheckpointError, match="vgg.pth: weights with names like features.0.weight do not"
    ):
        convert_checkpoint(tmp_path / "vgg.pth", tmp_path / "a.pth", built(classifier()))


# ------------------------------------------------------------------------------------ torchvision


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def torchvision_weights(resnet50, tmp_path_factory):
    path = tmp_path_factory.mktemp("torchvision") / "resnet50.pth.tar"
    torch.save({"state_dict": resnet50.state_dict(), "epoch": 90}, path)
    return path


def resnet(stem, stages, **keys):
    keys = {"MODEL__RESNETS__DEPTH": 50, "MODEL__SASA__WIDTH_MULTIPLIER": 4.0, **keys}
    cfg = classifier(ALL, stages=stages, MODEL__SASA__STEM=stem, **keys)
    return build_backbone(cfg, ShapeSpec(channels=3)).eval()


def test_a_convolutional_resnet_is_torchvision_s(resnet50, torchvision_weights, tmp_path):
    backbone = resnet("convolution", [])
    report = convert_checkpoint(torchvision_weights, tmp_path / "a.pth", backbone)
    assert len(report.loaded) == 318 and not report.missing and not report.mismatched
    assert report.dropped == {
        "fc.weight": "classifier",
        "fc.bias": "classifier",
        "epoch": "state of training",
    }
    backbone.load_state_dict(read_checkpoint(tmp_path / "a.pth")["model"])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = resnet50.maxpool(resnet50.relu(resnet50.bn1(resnet50.conv1(x))))
        for i, value in enumerate(backbone(x).values()):
            expected = getattr(resnet50, f"layer{i + 1}")(expected)
            torch.testing.assert_close(value, expected)


def test_an_attentional_resnet_takes_what_is_convolutional(torchvision_weights, tmp_path):
    target = resnet("convolution", ["res4", "res5"])
    report = convert_checkpoint(torchvision_weights, tmp_path / "a.pth", target)
    state = target.state_dict()
    is_attention = re.compile(r"res[45]\.\d\.(attention|norm)\.").match
    assert set(report.missing) == {key for key in state if is_attention(key)}
    assert {"stem.conv1.weight", "res3.0.conv2.weight", "res5.0.shortcut.weight"} < set(
        report.loaded
    )
    assert report.dropped["layer4.0.conv2.weight"] == "attention takes its place"
    why = "attention has no counterpart in a convolutional network"
    assert report.missing["res5.2.attention.query.weight"] == why
    # A model takes it where the same weights are named.
    model = torch.nn.ModuleDict({"backbone": target})
    with pytest.raises(CheckpointError, match="has no backbone.res4.0.attention"):
        Checkpointer(model).load(str(tmp_path / "a.pth"))
    Checkpointer(model, allow=report.weights_allow).load(str(tmp_path / "a.pth"))


def test_an_attention_stem_takes_nothing(torchvision_weights, tmp_path):
    report = convert_checkpoint(torchvision_weights, tmp_path / "a.pth", resnet("attention", ALL))
    assert not any(name.startswith("stem.") for name in report.loaded)
    assert report.dropped["conv1.weight"] == "attention takes its place"
    assert report.weights_allow == ("*.res?.?.attention.*", "*.res?.?.norm.*", "*.stem.*")
    pointwise = re.compile(r"res\d\.\d\.(conv[13]|shortcut)\.(norm\.)?\w+").fullmatch
    assert all(pointwise(name) for name in report.loaded) and len(report.loaded) == 216


def test_what_should_be_there_has_to_be(torchvision_weights, tmp_path):
    for key, message in (
        ("conv1.weight", "it has no stem.conv1.weight"),
        ("layer3.1.conv3.weight", "it has no res4.1.conv3.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(
                without(torchvision_weights, key), tmp_path / "a.pth", resnet("convolution", ALL)
            )
    with pytest.raises(CheckpointError, match="other shapes for res2.0.conv1.norm.bias"):
        target = resnet("convolution", ALL, MODEL__SASA__WIDTH_MULTIPLIER=2.0)
        convert_checkpoint(torchvision_weights, tmp_path / "a.pth", target)
    assert not any(tmp_path.iterdir())


def test_another_kind_of_resnet_is_refused(torchvision_weights, tmp_path):
    squeeze = {"layer1.0.se.fc1.weight": torch.ones(1)}
    path = without(torchvision_weights, **squeeze)
    with pytest.raises(CheckpointError, match="has no place for layer1.0.se.fc1.weight"):
        convert_checkpoint(path, tmp_path / "a.pth", resnet("attention", ALL))
    convert_checkpoint(path, tmp_path / "a.pth", resnet("attention", ALL), allow=["*.se.*"])


def test_a_norm_without_statistics_is_another(torchvision_weights, tmp_path):
    with pytest.raises(TransferError, match="no place for .*running_mean") as error:
        target = resnet("convolution", [], MODEL__RESNETS__NORM="GN")
        convert_checkpoint(torchvision_weights, tmp_path / "a.pth", target)
    assert not error.value.report.missing
    target = resnet("convolution", [], MODEL__RESNETS__NORM="FrozenBN")
    report = convert_checkpoint(torchvision_weights, tmp_path / "b.pth", target)
    counts = [name for name in report.dropped if name.endswith("num_batches_tracked")]
    assert len(counts) == 53 and len(report.loaded) == 318 - 53


def test_strides_in_pointwise_convolutions_are_refused(torchvision_weights, tmp_path):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    with pytest.raises(CheckpointError, match="set MODEL.RESNETS.STRIDE_IN_1X1 False"):
        convert_checkpoint(torchvision_weights, tmp_path / "a.pth", backbone)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    report = convert_checkpoint(torchvision_weights, tmp_path / "a.pth", backbone)
    assert len(report.loaded) == 318


# -------------------------------------------------------------------------------------------- SAN


def norm(channels):
    shape = (channels,)
    names = ("weight", "bias", "running_mean", "running_var")
    return {**dict.fromkeys(names, shape), "num_batches_tracked": ()}


def under(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def pointwise(inputs, outputs, bias=True):
    return {"weight": (outputs, inputs, 1, 1), **({"bias": (outputs,)} if bias else {})}


def san_release(kind, blocks):
    """List the weights of a released model with their shapes."""
    shapes = {**under("conv_in", pointwise(3, 64, False)), **under("bn_in", norm(64))}
    channels = 64
    for stage, num_blocks in enumerate(blocks):
        before, channels = channels, 64 if stage == 0 else 128 * 2**stage
        shapes |= under(f"conv{stage}", pointwise(before, channels, False))
        shapes |= under(f"bn{stage}", norm(channels))
        r, m, taps = channels // 16, channels // 4, 9 if stage == 0 else 49
        g = m // 8
        for i in range(num_blocks):
            block = {**under("bn1", norm(channels)), **under("bn2", norm(m))}
            block |= under("conv", pointwise(m, channels))
            for n, outputs in ((1, r), (2, r), (3, m)):
                block |= under(f"sam.conv{n}", pointwise(channels, outputs))
            inputs, hidden, outputs = (
                (r + 2, r, g) if kind == "pairwise" else (r * (taps + 1), g, g * taps)
            )
            block |= under("sam.conv_w.0", norm(inputs))
            block |= under("sam.conv_w.2", pointwise(inputs, hidden, False))
            block |= under("sam.conv_w.3", norm(hidden))
            block |= under("sam.conv_w.5", pointwise(hidden, outputs))
            if kind == "pairwise":
                block |= under("sam.conv_p", pointwise(2, 2))
            shapes |= under(f"layer{stage}.{i}", block)
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


@pytest.mark.parametrize(("kind", "count"), [("pairwise", 10_531_848), ("patchwise", 11_841_124)])
def test_the_official_san_release(tmp_path, kind, count):
    shapes = san_release(kind, (2, 1, 2, 4, 1))
    weights = {f"module.{name}": torch.rand(shape) for name, shape in shapes.items()}
    for name in weights:
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(w.numel() for name, w in weights.items() if not name.endswith(buffers)) == count
    rest = {"epoch": 100, "optimizer": {"state": {}}, "scheduler": {"base_lrs": [0.1]}}
    torch.save(
        {**rest, "state_dict": weights, "top1_val": 0.7, "top5_val": 0.9}, tmp_path / "s.pth"
    )
    cfg = config("Classifier", "build_san_backbone", [])
    cfg.MODEL.SAN.DEPTH, cfg.MODEL.SAN.ATTENTION = 10, kind
    cfg.MODEL.SAN.OUT_FEATURES = ["res2", "res5"]
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    report = convert_checkpoint(tmp_path / "s.pth", tmp_path / "a.pth", backbone)
    assert not report.missing and not report.mismatched
    classifier = dict.fromkeys(["module.fc.weight", "module.fc.bias"], "classifier")
    training = ["epoch", "optimizer", "scheduler", "top1_val", "top5_val"]
    assert report.dropped == {**classifier, **dict.fromkeys(training, "state of training")}
    backbone.load_state_dict(read_checkpoint(tmp_path / "a.pth")["model"], strict=True)
    block, name = backbone.res4.blocks[3], "module.layer3.3"
    for module, official in (
        (block.attention.key, "sam.conv2"),
        (block.attention.value, "sam.conv3"),
        (block.attention.weights[5], "sam.conv_w.5"),
        (block.project, "conv"),
        (block.norm2, "bn2"),
    ):
        assert torch.equal(module.weight, weights[f"{name}.{official}.weight"])
        assert torch.equal(module.bias, weights[f"{name}.{official}.bias"])
    # Into the other kind of attention it does not go.
    cfg.MODEL.SAN.ATTENTION = "patchwise" if kind == "pairwise" else "pairwise"
    with pytest.raises(CheckpointError, match="does not fit the target"):
        other = build_backbone(cfg, ShapeSpec(channels=3))
        convert_checkpoint(tmp_path / "s.pth", tmp_path / "b.pth", other)
