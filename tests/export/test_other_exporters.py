"""Exporters of detectron2 and PyTorch, called as their users call them, on our models."""

import io

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

from sasa_det import get_cfg
from sasa_det.layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from sasa_det.modeling import SAN, SASAResNet

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch deprecates TorchScript

SIZES = [(32, 64), (40, 33), (64, 32)]


def group_norm(channels):
    return torch.nn.GroupNorm(2, channels)


SMALL = {"num_heads": 2}
LAYERS = {
    "zero border": (LocalSelfAttention2d, {**SMALL, "border": "zero", "stride": 2}),
    "no content": (LocalSelfAttention2d, {**SMALL, "content": False}),
    "absolute": (
        LocalSelfAttention2d,
        {**SMALL, "position": "absolute", "qk_norm": "BN", "scale_logits": True},
    ),
    "cosine": (
        LocalSelfAttention2d,
        {**SMALL, "position": "none", "qk_norm": "cosine", "kernel_size": 5, "stride": 2},
    ),
    "RMS": (LocalSelfAttention2d, {**SMALL, "qk_norm": "RMS", "kernel_size": 3}),
    "mixture": (AttentionStem, SMALL),
    "mixture GN": (AttentionStem, {**SMALL, "norm": group_norm}),
    "pointwise": (AttentionStem, {**SMALL, "values": "pointwise", "relative": False}),
    "convolution": (AttentionStem, {**SMALL, "values": "convolution"}),
    "blocks of 3": (AttentionStem, {**SMALL, "block_size": 3, "relative": False}),
    "pairwise": (PairwiseAttention2d, {"kernel_size": 3}),
    "patchwise": (PatchwiseAttention2d, {"kernel_size": 3}),
}


KINK = ("pairwise", True)


def layer(name, backend):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return kind(4, 8, backend=backend, **options)


def exported(model, sample):
    """Return what runs the ONNX file that detectron2's call of the exporter makes."""
    import onnx
    import onnxruntime

    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            model,
            (sample,),
            file,
            opset_version=11,
            input_names=["image"],
            dynamic_axes={"image": {sample.ndim - 2: "height", sample.ndim - 1: "width"}},
            dynamo=False,
        )
    graph = onnx.load_from_string(file.getvalue())
    assert graph.opset_import[0].version == 11
    assert {node.domain for node in graph.graph.node} == {""}
    assert "Einsum" not in {node.op_type for node in graph.graph.node}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]


def images(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, *size, generator=generator) for size in SIZES]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_as_onnx(name, backend):
    attention = layer(name, backend).eval()
    small, *others = images(1, 4)
    run = exported(attention, small)
    for x in (small, *others, small[..., :1, :3]):
        with torch.no_grad():
            torch.testing.assert_close(run(x)[0], attention(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_as_programs_of_torch_export(name, backend):
    attention = layer(name, backend).eval()
    small, *others = images(1, 4)
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(attention, (small,), dynamic_shapes=(sides,)).module()
    for x in (small, *others):
        with torch.no_grad():
            torch.testing.assert_close(program(x), attention(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
def test_vector_attention_with_any_relation_as_a_program(kind):
    small, *others = images(1, 4)
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    for relation in kind.relations:
        attention = kind(4, 8, 3, relation).eval()
        program = torch.export.export(attention, (small,), dynamic_shapes=(sides,)).module()
        for x in (small, *others):
            torch.testing.assert_close(program(x), attention(x), rtol=0, atol=1e-4)


def detector(*opts):
    """A RetinaNet whose scores lie apart, or rounding would change their order."""
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.merge_from_file("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml")
    words = "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 26 MODEL.SASA.WIDTH_MULTIPLIER 0.25 "
    words += "MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN MODEL.RETINANET.NORM BN "
    words += "MODEL.FPN.OUT_CHANNELS 32 MODEL.RETINANET.NUM_CLASSES 3 MODEL.WEIGHTS '' "
    words += "MODEL.RETINANET.NUM_CONVS 1 MODEL.RETINANET.SCORE_THRESH_TEST 0.5 "
    words += "MODEL.SASA.ATTENTION_STAGES ['res5'] MODEL.SASA.NUM_HEADS 2 "
    words += "MODEL.RETINANET.IN_FEATURES ['p4'] MODEL.ANCHOR_GENERATOR.SIZES [[64]]"
    cfg.merge_from_list([word.strip("'") for word in words.split()] + list(opts))
    model = build_model(cfg).eval()
    *_, last = model.head.cls_score.modules()
    torch.nn.init.normal_(last.weight, std=20.0 * last.weight[0].numel() ** -0.5)
    torch.nn.init.zeros_(last.bias)
    return model


@pytest.mark.slow
def test_a_detector_as_onnx():
    """By the kernels' name: what the reference backend is exported to, its layers show."""
    model = detector()
    small, *others = (255 * image for image in images(3))
    adapter = TracingAdapter(model, (small,), inference).eval()
    run = exported(adapter, small)
    for image in (small, *others):
        boxes, classes, scores, _ = run(image)
        expected = inference(model, image)
        assert len(expected) > 5
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.01)
        assert torch.equal(classes, expected.pred_classes)


def inference(model, image):
    with torch.no_grad():
        return model([{"image": image}])[0]["instances"]


def operators(graph):
    for node in graph.nodes():
        yield node.kind()
        for block in node.blocks():
            yield from operators(block)


def backbones():
    features = {"out_features": ["stem", "res3"]}
    attention = {"backend": "reference"}
    small = {"depth": 26, "width_multiplier": 0.25, **features, "attention": attention}
    yield "SASA", lambda: SASAResNet(**small, stem_options=attention)
    for kind in ("pairwise", "patchwise"):
        yield kind, lambda kind=kind: SAN(attention=kind, **features, **attention)


@pytest.mark.parametrize("to_file", [torch.jit.trace, torch.jit.script])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in backbones()])
def test_files_of_the_reference_backend_hold_no_operators_of_this_package(make, to_file):
    torch.manual_seed(0)
    backbone = make().eval()
    small, *others = images(1, 3)
    with torch.no_grad():
        if to_file is torch.jit.trace:
            file = torch.jit.trace(backbone, (small,), strict=False)
        else:
            file = torch.jit.script(backbone)
        found = set(operators(file.inlined_graph))
        assert "aten::softmax" in found or "SAN" in type(backbone).__name__
        assert not [name for name in found if name.startswith("sasa_det")]
        for x in (small, *others):
            expected = backbone(x)
            for name, feature in file(x).items():
                torch.testing.assert_close(feature, expected[name], rtol=0, atol=1e-4)


# Not pairwise attention in training: norms of batches put a pixel's distance from itself onto the
# kink of the ReLU.
@pytest.mark.parametrize(
    "name, training",
    [(name, mode) for name in LAYERS for mode in (True, False) if (name, mode) != KINK],
)
def test_the_reference_backend_is_what_the_kernels_compute(name, training):
    for x in images(2, 4):
        results = []
        for backend in (None, "reference"):
            attention, image = layer(name, backend).train(training), x.clone().requires_grad_()
            output = attention(image)
            inputs = [image, *attention.parameters()]
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(output, inputs, direction)
            results.append([output, *grads])
        # Some gradients are sums of many terms that cancel.
        scale = max(expected.abs().max().item() for expected in results[0])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


def test_the_config_gives_the_backend_to_the_stem_and_to_san():
    for name, kinds in (
        ("build_retinanet_sasa_resnet_fpn_backbone", (AttentionStem, LocalSelfAttention2d)),
        ("build_retinanet_san_fpn_backbone", (PairwiseAttention2d, LocalSelfAttention2d)),
    ):
        model = detector("MODEL.BACKBONE.NAME", name, "MODEL.SASA.BACKEND", "reference")
        for kind in kinds:
            found = [module for module in model.modules() if isinstance(module, kind)]
            assert found and all(module.is_reference for module in found)
