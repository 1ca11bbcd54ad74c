"""FLOPs counted by hand, and what the processor is said to have."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sasa_det.analysis.complexity import count_config
from sasa_det.benchmark.cases import make_cases
from sasa_det.benchmark.measure import Settings
from sasa_det.benchmark.models import _DIGITS, twin_config
from sasa_det.benchmark.operators import convolutional_stem
from sasa_det.benchmark.peak import count_flops, has_bfloat16, peak_rate
from sasa_det.layers import AttentionStem, LocalSelfAttention2d

CONFIGS = Path(__file__).parents[2] / "configs"


def test_flops_by_hand():
    pixels = 2 * 9 * 11
    convolution = partial(nn.Conv2d, 32, 48, 3, padding=1, bias=False)
    assert count_flops(convolution, (2, 32, 9, 11)) == 2 * 9 * 32 * 48 * pixels
    layer = partial(LocalSelfAttention2d, 32, 48, kernel_size=5)
    # Three projections; q.k, q.r and the sum of values over 25 pixels.
    assert count_flops(layer, (2, 32, 9, 11)) == 2 * (3 * 32 * 48 + 3 * 25 * 48) * pixels
    # 64 filters of 7 x 7 x 3 at every second pixel.
    assert count_flops(convolutional_stem, (1, 3, 32, 32)) == 2 * 64 * 147 * 16 * 16
    # Queries, keys, four matrices of values and their mixture; 16 pixels of a block for each.
    stem = 2 * 3 * 64 + 4 * 64 * (3 + 1) + 3 * 16 * 64
    # How 4 matrices are mixed at 16 places, from 16 channels.
    mixing = 4 * 16 * 16
    assert count_flops(AttentionStem, (1, 3, 32, 32)) == 2 * (stem * 32 * 32 + mixing)


@pytest.fixture(scope="module")
def flops():
    settings = Settings("cpu", torch.float32, 2, 64, CONFIGS, bfloat16=True)
    groups = ["op", "layer", "backbone", "retinanet", "digits"]
    return {
        (case.name, contender.name): contender.flops and contender.flops()
        for case in make_cases(settings, groups)
        for contender in case.contenders
        if case.group != "retinanet" or contender.name.startswith("convolutional")
    }


def test_flops_of_contenders(flops):
    # Two images; maps of 8 x 8.
    convolution, pixels = 2 * 9 * 256 * 256, 2 * 8 * 8
    attention = 2 * 3 * 49 * 256
    projections = 2 * 3 * 256 * 256
    for way in ("attention", "attention, loop in PyTorch", "unfold"):
        assert flops["op forward", way] == attention * pixels
        assert flops["op forward + backward", way] == 3 * attention * pixels
    assert flops["op forward", "FlexAttention"] is None
    assert flops["op 64 forward", "3x3 convolution"] == 2 * 9 * 64 * 64 * 2 * 16 * 16
    assert flops["op 512 forward", "attention"] == 2 * 3 * 49 * 512 * 2 * 2 * 2
    for way in ("", ", bfloat16"):
        assert flops["layer forward", f"3x3 convolution{way}"] == convolution * pixels
        assert flops["layer forward + backward", f"attention{way}"] == (
            3 * (projections + attention) * pixels
        )
    assert flops["layer forward", "unfold"] == (projections + attention) * pixels


def test_flops_of_models(flops):
    # A ResNet-50 of stride 32 has 4087136256 multiply-adds on 224 x 224 pixels without its linear
    # layer; res5 sees 2 x 2 of 64 x 64 pixels, so that all are in the ratio of the areas.
    resnet = 2 * 4087136256 * 64 * 64 // (224 * 224)
    for way in ("convolutional", "convolutional, tuned"):
        assert flops["backbone forward", way] == 2 * resnet
        assert flops["backbone forward + backward", way] == 6 * resnet
    # Fusing changes no product.
    inference = {way: n for (case, way), n in flops.items() if case == "digits RetinaNet inference"}
    assert inference["attentional"] == inference["attentional, fused"]
    assert inference["convolutional"] == inference["convolutional, tuned"]
    # Eight images of 128 x 128, whatever the settings.
    settings = Settings("cpu", torch.float32, 2, 64, CONFIGS)
    parts = count_config(twin_config(settings, _DIGITS["attentional"]), 128, 128)
    assert flops["digits RetinaNet training step", "attentional"] == 3 * 8 * sum(
        p.flops for p in parts
    )
    step = flops["RetinaNet-50 training step", "convolutional"]
    assert step == 3 * flops["RetinaNet-50 inference", "convolutional, bfloat16"]


def test_bfloat16_of_the_processor(monkeypatch):
    capabilities = {"avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16() is False
    capabilities["amx_bf16"] = True
    assert has_bfloat16() is True
    # PyTorch before 2.11 tells of x86 alone, and another one may tell nothing.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert has_bfloat16() is True
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert has_bfloat16() is None


def test_peak_is_the_best_product(monkeypatch):
    names = ("large matrices", "small matrices", "large map", "small map")
    seconds = {name: [1.0, 2.0] for name in names}
    seconds["large matrices"].append(0.25)
    monkeypatch.setattr("sasa_det.benchmark.peak.time_rounds", lambda *_: seconds)
    assert peak_rate("cpu", torch.float32) == 2 * 2048**3 / 0.25
    seconds["large map"].append(0.01)
    assert peak_rate("cpu", torch.float32) == 2 * 9 * 256 * 256 * 6400 / 0.01
