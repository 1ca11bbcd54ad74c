"""Every key of detectron2 for a ResNet, an FPN or a RetinaNet changes our model or is refused."""

import hashlib

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sasa_det import add_sasa_config

# Another value of every key.
OTHERS = {
    "RESNETS": {
        "DEPTH": 38,
        "OUT_FEATURES": ["stem", "res2", "res3", "res4", "res5"],
        "NUM_GROUPS": 2,
        "NORM": "FrozenBN",
        "WIDTH_PER_GROUP": 128,
        "STRIDE_IN_1X1": True,
        "RES5_DILATION": 2,
        "RES2_OUT_CHANNELS": 512,
        "STEM_OUT_CHANNELS": 128,
        "DEFORM_ON_PER_STAGE": [False, False, False, True],
        "DEFORM_MODULATED": True,
        "DEFORM_NUM_GROUPS": 2,
    },
    "FPN": {
        "IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "OUT_CHANNELS": 32,
        "NORM": "BN",
        "FUSE_TYPE": "avg",
    },
    "RETINANET": {
        "NUM_CLASSES": 3,
        "IN_FEATURES": ["p7", "p6", "p5", "p4", "p3"],
        "NUM_CONVS": 2,
        "PRIOR_PROB": 0.1,
        "SCORE_THRESH_TEST": 0.2,
        "TOPK_CANDIDATES_TEST": 10,
        "NMS_THRESH_TEST": 0.3,
        "BBOX_REG_WEIGHTS": (2.0, 1.0, 1.0, 1.0),
        "IOU_THRESHOLDS": [0.3, 0.6],
        "IOU_LABELS": [0, 0, 1],
        "FOCAL_LOSS_GAMMA": 3.0,
        "FOCAL_LOSS_ALPHA": 0.4,
        "SMOOTH_L1_LOSS_BETA": 0.5,
        "BBOX_REG_LOSS_TYPE": "giou",
        "NORM": "BN",
    },
}
DEFAULTS = get_cfg()
KEYS = [(node, key) for node in OTHERS for key in DEFAULTS.MODEL[node]]


def config(head):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.merge_from_file("configs/Base-RetinaNet.yaml")
    values = {
        "DEVICE": "cpu",
        "RESNETS.DEPTH": 26,
        "RESNETS.NORM": "BN",
        "RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "FPN.OUT_CHANNELS": 64,
        "FPN.NORM": "",
        "RETINANET.NORM": "",
        "SASA.WIDTH_MULTIPLIER": 0.25,
        "SASA.ATTENTION_STAGES": ["res2"],
        "SASA.HEAD": head,
        "SASA.FPN": head,
    }
    for key, value in values.items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    return cfg


def described(value):
    """Describe what a model is made of, its first weights included."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, (torch.nn.Module)) or type(value).__module__.startswith("detectron2"):
        return type(value).__name__, described(getattr(value, "__dict__", repr(value)))
    return repr(value) if isinstance(value, (bool, int, float, str, set)) else type(value).__name__


def build(cfg):
    torch.manual_seed(0)
    return described(build_model(cfg))


@pytest.fixture(scope="module")
def unchanged():
    return {head: build(config(head)) for head in ("attention", "convolution")}


@pytest.mark.parametrize("head", ["attention", "convolution"])
@pytest.mark.parametrize("node,key", KEYS)
def test_a_key_changes_the_model_or_is_refused(node, key, head, unchanged):
    cfg = config(head)
    assert cfg.MODEL[node][key] != OTHERS[node][key]
    cfg.MODEL[node][key] = OTHERS[node][key]
    try:
        assert build(cfg) != unchanged[head]
    except ValueError as error:
        assert f"MODEL.{node}.{key} must be" in str(error)
