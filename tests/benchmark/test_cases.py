"""What stands beside what."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from sasa_det.benchmark.cases import GROUPS, choose_groups, make_cases
from sasa_det.benchmark.measure import Settings
from sasa_det.benchmark.models import _DIGITS, stock, twin_config
from sasa_det.benchmark.operators import convolutional_stem
from sasa_det.errors import UsageError
from sasa_det.modeling import use_products

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = Settings("cpu", torch.float32, 1, 640, CONFIGS, bfloat16=True)


def test_names_select_one_contender_each():
    cases = make_cases(SETTINGS, GROUPS)
    assert {case.group for case in cases} == set(GROUPS)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names) > 1
        rivals = {contender.rival for contender in case.contenders}
        assert rivals <= {None, *names}, case.name


def test_what_a_graph_of_a_gpu_holds_does_not_wait():
    # Meta tensors have no values: whatever waits for one raises an error.
    settings = Settings("meta", torch.float32, 2, 64, CONFIGS)
    cases = make_cases(settings, GROUPS)
    waiting = {"retinanet", "digits", "trainer", "san"}
    assert {case.group for case in cases if case.waits} == waiting
    for case in cases:
        for contender in () if case.waits else case.contenders:
            if not contender.foreign:
                contender.make()()


def test_rows():
    rows = {case.name: case for case in make_cases(SETTINGS, GROUPS)}
    for name, features in {
        "op 64": "64x160x160",
        "op 128": "128x80x80",
        "op 512": "512x20x20",
    }.items():
        assert f"1x{features}" in rows[f"{name} forward"].title
    step = rows["RetinaNet-50 training step"]
    rivals = {contender.name: contender.rival for contender in step.contenders}
    assert rivals == {
        "convolutional": "convolutional, tuned",
        "convolutional, tuned": "convolutional, tuned",
        "attentional": "convolutional, tuned",
        "convolutional, bfloat16": "convolutional, bfloat16",
        "attentional, bfloat16": "convolutional, bfloat16",
    }
    assert step.memory
    inference = [contender.name for contender in rows["backbone forward"].contenders]
    twins = ["convolutional", "convolutional, tuned", "attentional", "attentional, fused"]
    assert inference == twins
    digits = rows["digits RetinaNet training step"]
    assert "8x3x128x128" in digits.title
    stems = [*twins[:3], "attentional, convolutional stem"]
    assert [contender.name for contender in digits.contenders] == stems


def test_groups():
    assert choose_groups(None) == list(GROUPS)
    assert choose_groups("digits,op") == ["op", "digits"]
    with pytest.raises(UsageError, match="--cases takes op, .*, got speed, steam."):
        choose_groups("op,steam,speed")


def test_stock_twin_is_detectron2s():
    cfg = twin_config(SETTINGS, _DIGITS["convolutional"])
    model = stock(build_model(cfg))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) for module in convolutions} == {nn.Conv2d, Conv2d}
    ours = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("sasa_det")}
    assert ours == {"AttentionRetinaNet", "SASAResNet"}  # which put detectron2's parts together
    assert model.losses.__func__ is RetinaNet.losses
    pointwise = [module for module in convolutions if module.kernel_size == (1, 1)]
    use_products(model)
    # It would change every one of them.
    assert pointwise and not {type(module) for module in pointwise} & {nn.Conv2d, Conv2d}


def test_convolutional_stem_is_detectron2s():
    theirs, ours = BasicStem(3, 64, "BN"), convolutional_stem()
    ours[0].load_state_dict({"weight": theirs.conv1.weight})
    x = torch.randn(2, 3, 33, 47)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
