import pytest
import torchvision

from sasa_det.checkpoint import CheckpointError
from sasa_det.checkpoint.layouts import recognize


@pytest.fixture(scope="module")
def resnet50():
    return list(torchvision.models.resnet50().state_dict())


def test_names_of_a_resnet(resnet50):
    renamed = recognize(resnet50).rename(resnet50)
    assert list(renamed) == resnet50
    assert len(set(renamed.values())) == len(resnet50)
    expected = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer2.0.downsample.1.bias": "res3.0.shortcut.norm.bias",
        "layer3.5.bn2.num_batches_tracked": "res4.5.conv2.norm.num_batches_tracked",
        "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
        "fc.bias": "linear.bias",
    }
    assert {name: renamed[name] for name in expected} == expected


def test_timm_has_the_names_of_torchvision(resnet50):
    timm = pytest.importorskip("timm")
    assert list(timm.create_model("resnet50").state_dict()) == resnet50


def test_what_a_plain_resnet_has_not(resnet50):
    # Of timm's resnet50d and seresnet50.
    others = [
        "conv1.0.weight",
        "conv1.1.running_mean",
        "conv1.6.weight",
        "layer1.0.downsample.2.bias",
        "layer1.0.se.fc1.weight",
        "layer5.0.conv1.weight",
    ]
    renamed = recognize([*resnet50, *others]).rename([*resnet50, *others])
    assert list(renamed) == resnet50


def test_names_of_san():
    expected = {
        "conv_in.weight": "stem.conv.weight",
        "bn_in.running_mean": "stem.norm.running_mean",
        "conv0.weight": "stem.transition.weight",
        "bn0.weight": "stem.out_norm.weight",
        "layer0.1.bn1.weight": "stem.blocks.1.norm1.weight",
        "conv1.weight": "res2.transition.weight",
        "bn4.bias": "res5.out_norm.bias",
        "layer1.0.sam.conv1.weight": "res2.blocks.0.attention.query.weight",
        "layer1.0.sam.conv2.bias": "res2.blocks.0.attention.key.bias",
        "layer1.0.sam.conv3.weight": "res2.blocks.0.attention.value.weight",
        "layer3.12.sam.conv_w.0.running_var": "res4.blocks.12.attention.weights.0.running_var",
        "layer3.12.sam.conv_w.2.weight": "res4.blocks.12.attention.weights.2.weight",
        "layer4.0.sam.conv_w.5.bias": "res5.blocks.0.attention.weights.5.bias",
        "layer4.0.sam.conv_p.weight": "res5.blocks.0.attention.position.weight",
        "layer4.0.bn2.bias": "res5.blocks.0.norm2.bias",
        "layer4.0.conv.bias": "res5.blocks.0.project.bias",
        "fc.weight": "linear.weight",
    }
    assert recognize(expected).rename(expected) == expected
    wrapped = {f"module.{name}": new for name, new in expected.items()}
    assert recognize(wrapped).rename(wrapped) == wrapped


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up.", "module.backbone."])
def test_names_of_this_project(prefix):
    names = ["stem.query.weight", "res2.0.conv1.norm.weight", "res5.0.attention.key.weight"]
    renamed = recognize([prefix + name for name in names]).rename([prefix + name for name in names])
    assert renamed == {prefix + name: name for name in names}


WRAPPED = {
    "torch.compile": "_orig_mod.",
    "DDP of torch.compile": "module._orig_mod.",
    "torch.compile of DDP": "_orig_mod.module.",
    "Lightning": "model.",
    "Lightning of torch.compile": "model._orig_mod.",
    "FSDP": "_fsdp_wrapped_module.module.",
    "another": "student.encoder.",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_behind_one_prefix(resnet50, kind):
    sources = {
        "ResNet": (resnet50, recognize(resnet50).rename(resnet50)),
        "SAN": (["conv_in.weight"], {"conv_in.weight": "stem.conv.weight"}),
        "own": (
            ["backbone.bottom_up.stem.query.weight", "head.bias"],
            {"backbone.bottom_up.stem.query.weight": "stem.query.weight"},
        ),
    }
    for names, expected in sources.values():
        wrapped = [WRAPPED[kind] + name for name in names]
        layout = recognize(wrapped)
        assert layout.owner == recognize(names).owner
        renamed = layout.rename(wrapped)
        assert renamed == {WRAPPED[kind] + name: new for name, new in expected.items()}
        assert list(layout.bare(wrapped).values()) == names


def test_wrappers_of_parts():
    names = ["backbone._orig_mod.res2._checkpoint_wrapped_module.0.a", "head._orig_mod.bias"]
    assert recognize(names).rename(names) == {names[0]: "res2.0.a"}


def test_one_prefix_of_several(resnet50):
    names = [f"model.{name}" for name in resnet50] + ["criterion.weight", "ema.conv1.weight"]
    assert recognize(names) is None
    for prefix in ("model", "model."):
        layout = recognize(names, prefix)
        assert layout.rename(names) == {
            f"model.{name}": new for name, new in recognize(resnet50).rename(resnet50).items()
        }
        assert "criterion.weight" not in layout.bare(names)
    compiled = [f"model._orig_mod.{name}" for name in resnet50] + ["criterion.weight"]
    assert list(recognize(compiled, "model._orig_mod.").bare(compiled).values()) == resnet50
    with pytest.raises(CheckpointError, match="none of its weights .* prefix teacher."):
        recognize(names, "teacher.")
    assert recognize(names, "criterion.") is None


def test_names_outside_the_backbone():
    names = ["backbone.bottom_up.res2.a", "backbone.fpn_output3.a", "head.a", "roi_heads.res5.0.a"]
    expected = {names[0]: "res2.a", names[3]: "res5.0.a"}
    assert recognize(names).rename(names) == expected
    assert recognize(names[2:3]) is None and recognize([]) is None
