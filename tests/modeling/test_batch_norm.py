"""Batch norms with one value per channel are named, before a run where that can be known."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sasa_det import add_sasa_config
from sasa_det.config import read_keys
from sasa_det.modeling.batch_norm import SingleValueError, check_batch_norms, naming_batch_norms

CLASSIFIER = "configs/Quick/classifier_SASA.yaml"
RETINANET = "configs/COCO-Detection/retinanet_SASA_R_50_full.yaml"
MODELS = {
    "SASA": (CLASSIFIER, ()),
    "SAN": (
        CLASSIFIER,
        ("MODEL.BACKBONE.NAME", "build_san_backbone", "MODEL.SAN.ATTENTION", "patchwise")
        + ("MODEL.SAN.OUT_FEATURES", "['res3', 'linear']"),
    ),
    "RetinaNet": (RETINANET, ()),
    "convolutional RetinaNet": (RETINANET, ("MODEL.SASA.HEAD", "convolution")),
    "frozen": (CLASSIFIER, ("MODEL.RESNETS.NORM", "FrozenBN")),
}


def build(file, *opts):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.merge_from_file(file)
    small = {"RESNETS.DEPTH": 26, "SASA.WIDTH_MULTIPLIER": 0.25, "FPN.OUT_CHANNELS": 64}
    small |= {"DEVICE": "cpu", "WEIGHTS": ""}
    words = [word for key, value in small.items() for word in (f"MODEL.{key}", str(value))]
    cfg.merge_from_list([*words, *opts])
    return build_model(cfg).train()


def features_of(model, image):
    features = model.backbone(image)
    if hasattr(model, "head_in_features"):
        model.head([features[name] for name in model.head_in_features])


def refused(call):
    try:
        call()
    except SingleValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", MODELS)
def test_the_check_refuses_exactly_what_cannot_be_trained(kind):
    file, opts = MODELS[kind]
    model = build(file, *opts)
    found = {}
    for batch, side in [(1, 8), (1, 32), (1, 33), (1, 64), (1, 128), (1, 129), (2, 8)]:
        divisor = max(1, model.backbone.size_divisibility)
        padded = -(-side // divisor) * divisor

        def run(batch=batch, side=padded):
            trained = copy.deepcopy(model)  # detectron2's norms of the levels count their calls
            with torch.no_grad(), naming_batch_norms(trained):
                features_of(trained, torch.rand(batch, 3, side, side))

        found[batch, side] = refused(run)
        checked = refused(lambda batch=batch, side=side: check_batch_norms(model, batch, side))
        assert checked == found[batch, side], (batch, side)
    assert found[2, 8] == found[1, 129] == ""
    if kind == "frozen":
        assert not any(found.values())
    else:
        assert "one value per channel" in found[1, 8]
    if kind == "RetinaNet":  # P7 has a pixel for each 128 of the image
        assert found[1, 128].startswith("head.cls_subnet.0.norms.4 is a batch norm")


def test_the_check_is_not_a_training_whose_keys_nobody_reads(caplog, monkeypatch):
    monkeypatch.setattr(read_keys, "_read", set())  # by other tests
    model = build(CLASSIFIER).eval()
    model.backbone.recipe_keys = ("SOLVER.READ_BY_NOBODY",)
    check_batch_norms(model, 1, 192)
    assert "READ_BY_NOBODY" not in caplog.text
    model.train()  # which is one
    assert "READ_BY_NOBODY, which this training does not read" in caplog.text


def test_other_errors_pass():
    with pytest.raises(ValueError, match="^another$"), naming_batch_norms(torch.nn.Identity()):
        raise ValueError("another")
