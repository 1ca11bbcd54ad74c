"""SAN: published sizes and names, shapes, and its use as a backbone."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

import sasa_det  # noqa: F401
from sasa_det import add_sasa_config
from sasa_det.layers import PairwiseAttention2d, PatchwiseAttention2d
from sasa_det.modeling import SAN

LAYERS = {"pairwise": PairwiseAttention2d, "patchwise": PatchwiseAttention2d}
STAGES = ["stem", "res2", "res3", "res4", "res5"]
CHANNELS = [64, 256, 512, 1024, 2048]
BLOCKS = {10: [2, 1, 2, 4, 1], 15: [3, 2, 3, 5, 2], 19: [3, 3, 4, 6, 3]}
MODELS = [(depth, attention) for depth in BLOCKS for attention in LAYERS]


def config(backbone="build_san_backbone", **san):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.SASA.FPN = "convolution"
    cfg.MODEL.SAN.update(san)
    return cfg


def classifier(depth, attention):
    with torch.device("meta"):
        return SAN(depth=depth, attention=attention, num_classes=1000).eval()


@pytest.mark.parametrize("attention", LAYERS)
@pytest.mark.parametrize("factor", [0.25, 0.75, 1.5])
def test_width(attention, factor):
    torch.manual_seed(0)
    model = build_backbone(
        config(ATTENTION=attention, WIDTH_MULTIPLIER=factor, OUT_FEATURES=STAGES)
    )
    with torch.device("meta"):
        full = dict(SAN(attention=attention).named_children())
    widths = [int(factor * channels) for channels in CHANNELS]
    assert [shape.channels for shape in model.output_shape().values()] == widths
    for name, width in zip(STAGES, widths, strict=True):
        layer = getattr(model, name).blocks[0].attention
        assert layer.out_channels == width // 4 and layer.relation_channels == width // 16
        # Windows have as many weights as at full width.
        assert layer.groups == full[name].blocks[0].attention.groups
    image = torch.randn(2, 3, 40, 33)
    for (name, feature), width in zip(model(image).items(), widths, strict=True):
        stride = model.output_shape()[name].stride
        assert feature.shape == (2, width, -(-40 // stride), -(-33 // stride))
        assert feature.isfinite().all()


def published_state(depth, attention):
    """Names and shapes of a checkpoint of the paper's authors, without `module.`."""
    state = {}

    def linear(name, outputs, inputs, bias=True):
        state[f"{name}.weight"] = (outputs, inputs, 1, 1)
        if bias:
            state[f"{name}.bias"] = (outputs,)

    def norm(name, channels):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{tensor}"] = (channels,)
        state[f"{name}.num_batches_tracked"] = ()

    linear("conv_in", 64, 3, bias=False)
    norm("bn_in", 64)
    before = 64
    for s, (width, blocks) in enumerate(zip(CHANNELS, BLOCKS[depth], strict=True)):
        taps = 9 if s == 0 else 49
        rel, mid, groups = width // 16, width // 4, width // 32
        linear(f"conv{s}", width, before, bias=False)
        norm(f"bn{s}", width)
        for i in range(blocks):
            block = f"layer{s}.{i}"
            norm(f"{block}.bn1", width)
            for number, outputs in enumerate([rel, rel, mid], start=1):
                linear(f"{block}.sam.conv{number}", outputs, width)
            if attention == "pairwise":
                sizes = (rel + 2, rel, groups)
                linear(f"{block}.sam.conv_p", 2, 2)
            else:
                sizes = (rel * (taps + 1), groups, groups * taps)
            norm(f"{block}.sam.conv_w.0", sizes[0])
            linear(f"{block}.sam.conv_w.2", sizes[1], sizes[0], bias=False)
            norm(f"{block}.sam.conv_w.3", sizes[1])
            linear(f"{block}.sam.conv_w.5", sizes[2], sizes[1])
            norm(f"{block}.bn2", mid)
            linear(f"{block}.conv", width, mid)
        before = width
    state["fc.weight"], state["fc.bias"] = (1000, before), (1000,)
    return state


def published_name(name):
    name = name.replace("stem.conv.", "conv_in.").replace("stem.norm.", "bn_in.")
    name = name.replace("linear.", "fc.")
    for s, stage in enumerate(STAGES):
        name = name.replace(f"{stage}.transition.", f"conv{s}.")
        name = name.replace(f"{stage}.out_norm.", f"bn{s}.")
        name = name.replace(f"{stage}.blocks.", f"layer{s}.")
    layers = {"query": "conv1", "key": "conv2", "value": "conv3"}
    layers |= {"weights": "conv_w", "position": "conv_p"}
    for ours, theirs in layers.items():
        name = name.replace(f".attention.{ours}.", f".sam.{theirs}.")
    return name.replace("norm1", "bn1").replace("norm2", "bn2").replace("project", "conv")


@pytest.mark.parametrize("depth,attention", MODELS)
def test_names_and_shapes_are_the_published_ones_but_for_their_words(depth, attention):
    state = classifier(depth, attention).state_dict()
    names = {published_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert len(names) == len(state)
    assert names == published_state(depth, attention)


def test_a_state_dict_makes_the_same_model_again(tmp_path):
    torch.manual_seed(0)
    models = [SAN(attention="patchwise", out_features=["stem", "res2"]) for _ in range(2)]
    models[0](torch.randn(2, 3, 16, 16))  # moves the statistics of the norms
    torch.save(models[0].state_dict(), tmp_path / "san.pth")
    models[1].load_state_dict(torch.load(tmp_path / "san.pth", weights_only=True))
    x = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        first, second = (model.eval()(x) for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("attention", LAYERS)
def test_odd_sizes_round_up_at_every_stage(attention):
    model = build_backbone(config(ATTENTION=attention, OUT_FEATURES=STAGES)).eval()
    shapes = model.output_shape()
    assert [spec.channels for spec in shapes.values()] == CHANNELS
    assert [spec.stride for spec in shapes.values()] == [2, 4, 8, 16, 32]
    for size in [(1, 1), (33, 47)]:
        outputs = model(torch.randn(1, 3, *size))
        assert list(outputs) == STAGES
        for name, spec in shapes.items():
            height, width = (-(-side // spec.stride) for side in size)
            assert outputs[name].shape == (1, spec.channels, height, width), name
            assert outputs[name].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_no_images_have_no_features(attention, backend):
    model = SAN(attention=attention, width_multiplier=0.25, backend=backend, num_classes=7).eval()
    assert model(torch.randn(0, 3, 33, 64))["linear"].shape == (0, 7)


def test_stages_compute_what_they_say():
    torch.manual_seed(0)
    model = SAN(out_features=["stem", "res2"]).eval()
    x = torch.randn(1, 3, 12, 16)
    outputs = model(x)

    def run(stage, x):
        x = stage.transition(F.max_pool2d(x, 2))
        for block in stage.blocks:
            attended = block.attention(block.norm1(x).relu())
            x = x + block.project(block.norm2(attended).relu())
        return stage.out_norm(x).relu()

    stem = run(model.stem, model.stem.norm(model.stem.conv(x)).relu())
    torch.testing.assert_close(outputs["stem"], stem)
    torch.testing.assert_close(outputs["res2"], run(model.res2, stem))


def test_what_no_feature_needs_is_not_built():
    def children(*features):
        cfg = config(OUT_FEATURES=list(features))
        cfg.MODEL.CLASSIFIER.NUM_CLASSES = 7
        with torch.device("meta"):
            model = build_backbone(cfg)
        assert list(model.output_shape()) == list(features)
        return [name for name, _ in model.named_children()]

    assert children("res3") == ["stem", "res2", "res3"]
    assert children("stem", "res2") == ["stem", "res2"]
    assert children("res2", "res5") == STAGES
    assert children("linear") == [*STAGES, "linear"]
    assert children("res2", "linear") == [*STAGES, "linear"]


@pytest.mark.parametrize("attention", LAYERS)
def test_classifier_learns(attention):
    torch.manual_seed(0)
    cfg = config(ATTENTION=attention, OUT_FEATURES=["linear"])
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 3
    model = build_backbone(cfg)
    assert model.output_shape()["linear"].channels == 3
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(images)["linear"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad is not None for p in model.parameters())


def test_options_reach_every_layer():
    cfg = config(ATTENTION="patchwise", DEPTH=15, RELATION="star_product", OUT_FEATURES=STAGES)
    with torch.device("meta"):
        model = build_backbone(cfg)
    layers = [m for m in model.modules() if isinstance(m, PatchwiseAttention2d)]
    assert len(layers) == sum(BLOCKS[15])
    assert {layer.relation for layer in layers} == {"star_product"}
    assert [getattr(model, name).blocks[0].attention.kernel_size for name in STAGES] == [
        3, 7, 7, 7, 7,
    ]  # fmt: skip


@torch.no_grad()
def test_positions_of_a_fixed_size():
    models = []
    for size in (0, 96):
        torch.manual_seed(0)
        models.append(build_backbone(config(POSITION_SIZE=size, OUT_FEATURES=["res4"])).eval())
    x = torch.randn(1, 3, 96, 96)
    features = [model(x)["res4"] for model in models]
    torch.testing.assert_close(*features, rtol=1e-3, atol=1e-4)
    assert [getattr(models[1], name).blocks[0].attention.position_size for name in STAGES[:4]] == [
        48, 24, 12, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "SyncBN", "naiveSyncBN"])
def test_norms_of_detectron2(norm):
    model = build_backbone(config(NORM=norm, OUT_FEATURES=["res2"])).train()
    model(torch.randn(2, 3, 20, 20))["res2"].mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any("norm" in name for name in model.state_dict()) == bool(norm)


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
def test_freeze_at(freeze_at):
    cfg = config(OUT_FEATURES=["res4"])
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    with torch.device("meta"):
        model = build_backbone(cfg)
    for number, name in enumerate(["stem", "res2", "res3", "res4"], start=1):
        frozen = number <= freeze_at
        modules = list(getattr(model, name).modules())
        assert all(p.requires_grad != frozen for p in getattr(model, name).parameters()), name
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in modules) != frozen, name
        assert any(isinstance(m, FrozenBatchNorm2d) for m in modules) == frozen, name


def detector(architecture, attention, fpn, masks=False):
    levels = ["res3", "res4", "res5"]
    if architecture == "AttentionRetinaNet":
        cfg = config("build_retinanet_san_fpn_backbone", ATTENTION=attention, OUT_FEATURES=levels)
        cfg.MODEL.RETINANET.NUM_CONVS = 1
    else:
        levels = ["res2", *levels]
        cfg = config("build_san_fpn_backbone", ATTENTION=attention, OUT_FEATURES=levels)
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
        cfg.MODEL.MASK_ON = masks
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.FPN.IN_FEATURES = levels
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.SASA.FPN = cfg.MODEL.SASA.HEAD = fpn
    cfg.MODEL.SAN.POSITION_SIZE = 224
    return build_model(cfg)


@pytest.mark.parametrize(
    "architecture,attention,fpn,masks",
    [
        ("AttentionRetinaNet", "pairwise", "attention", False),
        ("AttentionRetinaNet", "patchwise", "convolution", False),
        ("GeneralizedRCNN", "patchwise", "attention", False),
        ("GeneralizedRCNN", "pairwise", "convolution", False),
        ("GeneralizedRCNN", "pairwise", "attention", True),
        ("GeneralizedRCNN", "patchwise", "convolution", True),
    ],
)
def test_detectors_train_and_detect(architecture, attention, fpn, masks):
    torch.manual_seed(0)
    model = detector(architecture, attention, fpn, masks).train()
    assert isinstance(model.backbone.bottom_up, SAN)
    instances = Instances((45, 61))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 40.0, 38.0]]))
    instances.gt_classes = torch.tensor([1])
    if masks:
        instances.gt_masks = PolygonMasks([[[5.0, 5.0, 40.0, 5.0, 20.0, 38.0]]])
    image = torch.randint(0, 256, (3, 45, 61), dtype=torch.uint8)
    inputs = [{"image": image, "instances": instances, "height": 90, "width": 122}]
    with EventStorage():
        losses = model(inputs)
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    for name, parameter in model.backbone.bottom_up.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        (output,) = model.eval()(inputs)
    assert output["instances"].image_size == (90, 122)
    assert output["instances"].scores.isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_image_of_another_type_is_refused(backend):
    san = SAN(width_multiplier=0.25, out_features=["stem"], backend=backend).eval().bfloat16()
    image = torch.zeros(1, 3, 8, 8)
    with torch.no_grad():
        assert san(image.bfloat16())["stem"].dtype == torch.bfloat16
        with pytest.raises(ValueError, match="of a SAN must have the type of its weights, .*16"):
            san(image)


@pytest.mark.parametrize("change,message", [
    ({"ATTENTION": "patch"}, "MODEL.SAN.ATTENTION.* must be one of .*got 'patch'"),
    ({"DEPTH": 50}, "MODEL.SAN.DEPTH.* must be one of .*got 50"),
    ({"RELATION": "clique_product"}, "MODEL.SAN.RELATION. of pairwise .*got 'clique_product'"),
    ({"NORM": "BatchNorm"}, "MODEL.SAN.NORM.* must be a norm of detectron2.*'BatchNorm'"),
    ({"NORM": "GN"}, "MODEL.SAN.NORM.* must be a norm for any number of channels.*got 'GN'"),
    ({"OUT_FEATURES": ["p2"]}, "MODEL.SAN.OUT_FEATURES.* must be one of .*got 'p2'"),
    ({"OUT_FEATURES": []}, "MODEL.SAN.OUT_FEATURES. must name at least one feature"),
    ({"POSITION_SIZE": 32}, "POSITION_SIZE. must be 0 or more than .* 32, got 32"),
    ({"WIDTH_MULTIPLIER": 0.3}, "WIDTH_MULTIPLIER. must be a positive multiple .*, got 0.3"),
    ({"WIDTH_MULTIPLIER": -0.5}, "WIDTH_MULTIPLIER. must be a positive multiple .*, got -0.5"),
    ({"WIDTH_MULTIPLIER": float("nan")}, "WIDTH_MULTIPLIER. must be a positive .*, got nan"),
])  # fmt: skip
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**change))
