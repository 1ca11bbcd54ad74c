"""What detectron2 does with its own models works with ours: scripting, tracing, analysis."""

from contextlib import contextmanager

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.export import TracingAdapter, dump_torchscript_IR, scripting_with_instances
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.analysis import (
    find_unused_parameters,
    flop_count_operators,
    parameter_count,
)
from detectron2.utils.events import EventStorage
from detectron2.utils.testing import (
    assert_instances_allclose,
    convert_scripted_instances,
    reload_script_model,
)

from sasa_det import add_sasa_config
from sasa_det.layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from sasa_det.modeling import SAN, SASAResNet

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch deprecates TorchScript

RETINANET = "configs/COCO-Detection/retinanet_SASA_R_50_full.yaml"
MASK_RCNN = "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml"


def config(file, *opts):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.merge_from_file(file)
    # A small one, with norms that can be scripted: PyTorch's SyncBatchNorm cannot.
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "64"),
            *("MODEL.RESNETS.DEPTH", "26", "MODEL.SASA.WIDTH_MULTIPLIER", "0.25"),
            *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.RETINANET.NORM", "BN"),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", "64", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", "50", *opts),
        ]
    )
    return cfg


def model(file, *opts):
    torch.manual_seed(0)
    # Detections of a model without training: there must be some to compare.
    low = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    detector = build_model(config(file, *low, *opts)).eval()
    # And their scores must lie apart, or rounding would change their order.
    for name, weight in detector.named_parameters():
        if not name.startswith("backbone") and weight.ndim > 1 and "bbox_pred" not in name:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
    return detector


def backbones():
    features = {"out_features": ["stem", "res2", "res3", "res4", "res5"]}
    small = {"depth": 26, "width_multiplier": 0.25, **features}
    yield "attention", lambda: SASAResNet(**small)
    yield "convolution", lambda: SASAResNet(**small, stem="convolution", attention_stages=[])
    yield "frozen", lambda: SASAResNet(**small, norm="FrozenBN", freeze_at=2)
    absolute = {"position": "absolute", "backend": "loop"}
    yield "absolute loop", lambda: SASAResNet(**small, attention=absolute, norm="")
    yield "classifier", lambda: SASAResNet(depth=26, width_multiplier=0.25, num_classes=5)
    yield "patchwise SAN", lambda: SAN(attention="patchwise", out_features=["stem", "res3"])
    yield "SAN classifier", lambda: SAN(num_classes=5, position_size=64)
    for name, fpn in (("sasa_resnet", "attention"), ("san", "convolution")):
        name = f"build_retinanet_{name}_fpn_backbone"
        cfg = config(RETINANET, "MODEL.BACKBONE.NAME", name, "MODEL.SASA.FPN", fpn)
        yield name, lambda cfg=cfg: build_backbone(cfg)


@pytest.mark.parametrize("name", ["sasa_resnet", "sasa_resnet_fpn", "san", "san_fpn"])
def test_scripts_of_standard_operators_are_bit_equal(name):
    """As detectron2's test_backbone asks for: in training, to 1e-8 where features are near zero."""
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.BACKBONE.NAME = f"build_{name}_backbone"
    cfg.MODEL.SASA.BACKEND = "reference"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.SASA.WIDTH_MULTIPLIER = 26, 0.5
    cfg.MODEL.SAN.WIDTH_MULTIPLIER = 0.25
    if name.endswith("fpn"):
        cfg.MODEL.SAN.ATTENTION = "patchwise"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    torch.manual_seed(0)
    backbone = build_backbone(cfg)
    scripted = torch.jit.script(backbone)
    x = torch.rand(2, 3, 64, 64)
    for name, feature in backbone(x).items():
        assert torch.allclose(feature, scripted(x)[name])


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in backbones()])
def test_backbones_can_be_scripted(make):
    torch.manual_seed(0)
    backbone = make().eval()
    scripted = torch.jit.script(backbone)
    for size in ((32, 32), (64, 96)):
        x = torch.rand(2, 3, *size)
        expected, actual = backbone(x), scripted(x)
        assert actual.keys() == expected.keys()
        for name, feature in expected.items():
            torch.testing.assert_close(actual[name], feature, rtol=1e-4, atol=1e-4)
    # The operators of a script have their gradients.
    grads = []
    for run in (backbone, scripted):
        image = x.clone().requires_grad_()
        loss = sum(feature.square().mean() for feature in run(image).values())
        grads += torch.autograd.grad(loss, image)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalSelfAttention2d(8, 8, 3, num_heads=2, content=False, border="zero"),
        lambda: LocalSelfAttention2d(8, 8, 3, num_heads=2, position="none"),
        lambda: AttentionStem(8, 16, 4, 4, values="pointwise", relative=False),
        lambda: AttentionStem(8, 16, 4, 4, values="convolution", relative=False),
    ],
)
def test_attention_can_be_scripted(make):
    torch.manual_seed(0)
    layer, x = make().eval(), torch.rand(2, 8, 6, 9, requires_grad=True)
    found, expected = torch.jit.script(layer)(x), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.square().mean(), x)[0] for y in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kind,relation",
    [(kind, r) for kind in (PairwiseAttention2d, PatchwiseAttention2d) for r in kind.relations],
)
def test_vector_attention_can_be_scripted(kind, relation):
    torch.manual_seed(0)
    layer, x = kind(8, 8, 5, relation).eval(), torch.rand(2, 8, 6, 2)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def images(count, size=(96, 128)):
    generator = torch.Generator().manual_seed(0)
    return [255 * torch.rand(3, *size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.SASA.HEAD", "attention"),
        ("MODEL.SASA.HEAD", "attention", "MODEL.RETINANET.NORM", "GN"),
        ("MODEL.SASA.HEAD", "convolution", "MODEL.RETINANET.NORM", ""),
    ],
)
def test_retinanet_can_be_scripted(opts):
    retinanet = model(RETINANET, *opts)
    # Scores lie apart, so that rounding does not change their order.
    *_, last = retinanet.head.cls_score.modules()
    torch.nn.init.normal_(last.weight, std=4.0 * last.weight[0].numel() ** -0.5)
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    scripted = scripting_with_instances(retinanet, fields)
    inputs = [{"image": image} for image in images(2)]
    with torch.no_grad(), modules_one_after_another():
        outputs = zip(inputs, retinanet(inputs), scripted(inputs), strict=True)
        for sample, expected, actual in outputs:
            assert len(expected["instances"])
            # A script leaves the last step to its user.
            actual = detector_postprocess(
                convert_scripted_instances(actual), *sample["image"].shape[1:]
            )
            assert_instances_allclose(expected["instances"], actual, rtol=1e-3)


@contextmanager
def modules_one_after_another():
    """Let no block run as one piece, as in a script.

    Its rounding would change the order of the scores of a model that has learnt nothing.
    """
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.slow
def test_mask_rcnn_can_be_scripted_and_saved():
    mask_rcnn = model(MASK_RCNN)
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    scripted = reload_script_model(scripting_with_instances(mask_rcnn, fields))
    inputs = [{"image": images(1)[0]}, {"image": images(1, (64, 64))[0]}]
    with torch.no_grad(), modules_one_after_another():
        expected = mask_rcnn.inference(inputs, do_postprocess=False)[0]
        actual = scripted.inference(inputs, do_postprocess=False)[0]
    assert len(expected)
    assert_instances_allclose(expected, actual, rtol=1e-3)


def detect_with_retinanet(model, image):
    return model.forward([{"image": image}])[0]["instances"]


def detect_with_rcnn(model, image):
    return model.inference([{"image": image}], do_postprocess=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file,inference", [(RETINANET, detect_with_retinanet), (MASK_RCNN, detect_with_rcnn)]
)
def test_a_trace_takes_other_sizes(file, inference, tmp_path):
    detector, (image,) = model(file), images(1)
    adapter = TracingAdapter(detector, (image,), inference).eval()
    with torch.no_grad():
        smaller = torch.nn.functional.interpolate(image[None], scale_factor=0.6)[0]
        torch.jit.trace(adapter, (smaller,)).save(tmp_path / "model.jit")
        traced = torch.jit.load(tmp_path / "model.jit")
        expected = inference(detector, image)
        actual = adapter.outputs_schema(traced(image))
    assert len(expected)
    assert_instances_allclose(expected, actual, rtol=1e-3, size_as_tensor=True)


def test_the_graph_of_a_trace_is_dumped(tmp_path):
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = SASAResNet(depth=26, width_multiplier=0.25)

        def forward(self, x):
            return tuple(self.backbone(x).values())

    with torch.no_grad():
        traced = torch.jit.trace(Features().eval(), (torch.rand(1, 3, 64, 64),))
    dump_torchscript_IR(traced, str(tmp_path))
    for name in ("model_ts_code", "model_ts_IR", "model_ts_IR_inlined", "model"):
        assert (tmp_path / f"{name}.txt").stat().st_size, name
    assert "sasa_det::local_attention" in (tmp_path / "model_ts_IR_inlined.txt").read_text()


@pytest.mark.parametrize("file", [RETINANET, MASK_RCNN])
def test_analysis(file):
    detector = model(file)
    (image,) = images(1, (64, 64))
    # By hand: the lateral layer of p5 is a product of 512 x 64 at 2 x 2 places, without bias.
    counts = flop_count_operators(detector, [{"image": image, "unused": "text"}])
    assert counts["conv"] > 512 * 64 * 2 * 2 / 1e9
    parameters = parameter_count(detector)
    assert parameters[""] == sum(p.numel() for p in detector.parameters())
    assert parameters["backbone"] == sum(p.numel() for p in detector.backbone.parameters())
    backbone = detector.backbone.bottom_up

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.idle = backbone.train(), torch.nn.Linear(1, 1)

        def forward(self, x):
            return sum(y.sum() for y in self.backbone(x).values())

    unused = find_unused_parameters(Sum(), torch.rand(2, 3, 64, 64))
    assert set(unused) == {"idle.weight", "idle.bias"}


def objects(size, count):
    boxes = torch.rand(count, 4) * 20
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        size,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.arange(3, 3 + count),
        gt_masks=BitMasks(torch.rand(count, *size) > 0.5),
    )


@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
@pytest.mark.parametrize("file", [RETINANET, MASK_RCNN])
def test_images_without_objects_train_and_are_detected_in(file, counts):
    detector, sizes = model(file), [(100, 125), (100, 124)]
    inputs = [{"image": torch.rand(3, *size)} for size in sizes]
    assert [len(output) for output in detector(inputs)] == [1, 1]
    for sample, size, count in zip(inputs, sizes, counts, strict=True):
        sample["instances"] = objects(size, count)
    with EventStorage():
        losses = detector.train()(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    grads = [p.grad for p in detector.backbone.parameters() if p.requires_grad]
    assert any(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scores_that_are_not_finite_give_no_finite_boxes(value):
    detector = model(RETINANET)
    detector.test_score_thresh = -1e9
    image = torch.full((3, 128, 128), value)
    (output,) = detector([{"image": image}])
    assert not torch.isfinite(output["instances"].pred_boxes.tensor).any()
