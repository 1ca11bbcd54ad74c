"""Exported files beside the model, in a process without this package, and what they consist of."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from sasa_det.config.load import load_config
from sasa_det.errors import CheckpointError, UsageError
from sasa_det.export import FORMATS, export_model, read_exported
from sasa_det.modeling import fuse

SIZES = [(64, 96), (32, 32), (77, 130)]

# What is exported by a trace takes any detector of a test; torch.export takes a minute for that.
TRACED = ["torchscript", "onnx"]

# It runs a file on images, and neither this package nor detectron2 can be imported.
ALONE = """
import sys

BLOCKED = ("sasa_det", "detectron2")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was imported")

import numpy as np

path, images, output = sys.argv[1:]
if path.endswith(".onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda image: session.run(None, {"image": image})
else:
    import torch, torchvision

    if path.endswith(".ts"):
        model = torch.jit.load(path)
    else:
        model = torch.export.load(path).module(check_guards=False)

    def run(image):
        with torch.no_grad():
            return [x.numpy() for x in model(torch.from_numpy(image))]
results = {}
for name, image in np.load(images).items():
    for i, x in enumerate(run(image)):
        results[f"{name}/{i}"] = x
np.savez(output, **results)
assert not [name for name in sys.modules if name.split(".")[0] in BLOCKED]
"""


def detector(*opts, levels=("p4", "p5", "p6")):
    """A small detector whose random scores lie apart, so that their order is certain.

    It has attention in the stem, a stage, the FPN and the heads, and two heads of attention, whose
    operators a file holds one after the other: more of either is no other code.
    """
    torch.manual_seed(0)
    sizes = [[16], [32], [64]][: len(levels)]
    small = ["MODEL.RESNETS.DEPTH", "26", "MODEL.SASA.ATTENTION_STAGES", "['res5']"]
    opts = ["MODEL.DEVICE", "cpu", *small, "MODEL.SASA.NUM_HEADS", "2", *opts]
    opts += [
        "MODEL.RETINANET.IN_FEATURES",
        str(list(levels)),
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        "0.3",
    ]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", str(sizes)]
    model = build_model(load_config("configs/Quick/retinanet_SASA.yaml", opts)).eval()
    last = model.head.cls_score[-1]
    torch.nn.init.normal_(last.weight, std=40.0 * last.weight.shape[1] ** -0.5)
    torch.nn.init.zeros_(last.bias)
    return model


def images():
    generator = torch.Generator().manual_seed(1)
    return {
        f"{height}x{width}": 255 * torch.rand(3, height, width, generator=generator)
        for height, width in SIZES
    }


def run_alone(path, folder, samples):
    np.savez(folder / "images.npz", **{name: image.numpy() for name, image in samples.items()})
    command = [sys.executable, "-c", ALONE, path, folder / "images.npz", folder / "found.npz"]
    result = subprocess.run(map(str, command), capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return np.load(folder / "found.npz")


def operators(path):
    """List the operators of a file, by domain or namespace and name."""
    if path.suffix == ".onnx":
        import onnx

        def walk(graph):
            for node in graph.node:
                yield f"{node.domain or 'onnx'}::{node.op_type}"
                for attribute in node.attribute:
                    if attribute.HasField("g"):
                        yield from walk(attribute.g)

        return set(walk(onnx.load(path).graph))
    if path.suffix == ".ts":

        def walk(block):
            for node in block.nodes():
                yield node.kind()
                for inner in node.blocks():
                    yield from walk(inner)

        return set(walk(torch.jit.load(path).inlined_graph))
    nodes = torch.export.load(path).graph.nodes
    called = [node.target for node in nodes if node.op == "call_function"]
    return {op.name() for op in called if isinstance(op, torch._ops.OpOverload)}


@pytest.fixture(scope="module")
def model():
    return detector()


@pytest.mark.slow
@pytest.mark.parametrize("format", TRACED)
def test_a_detector_runs_without_this_package_at_any_size(model, format, tmp_path):
    path = tmp_path / f"model{FORMATS[format]}"
    samples = images()
    export_model(model, 255 * torch.rand(3, 96, 128), path, format, facts={"classes": ["a"]})
    found = run_alone(path, tmp_path, samples)
    exported = read_exported(path)
    assert exported.facts == {
        "classes": ["a"],
        "kind": "detector",
        "outputs": ["boxes", "scores", "classes"],
        "input_size": None,
    }
    for name, image in samples.items():
        with torch.no_grad():
            expected = model([{"image": image}])[0]["instances"]
        boxes, scores, classes = (torch.from_numpy(found[f"{name}/{i}"]) for i in range(3))
        assert len(expected) > 5
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=0.01)
        assert torch.equal(classes, expected.pred_classes)
        again = exported([{"image": image}])[0]["instances"]
        torch.testing.assert_close(again.pred_boxes.tensor, boxes, rtol=0, atol=1e-3)
    kinds = {name.partition("::")[0] for name in operators(path)}
    assert kinds <= {"aten", "prim", "torchvision", "onnx"}
    assert operators(path) & {"onnx::NonMaxSuppression", "torchvision::nms"}


@pytest.mark.slow
def test_a_detector_as_a_program_of_torch_export(tmp_path):
    """Of one size and with attention in the heads of one level alone, which is seconds."""
    model = detector(
        *("MODEL.SASA.ATTENTION_STAGES", "[]", "MODEL.SASA.STEM", "convolution"),
        *("MODEL.SASA.FPN", "convolution"),
        levels=["p4"],
    )
    path = tmp_path / "model.pt2"
    image = 255 * torch.rand(3, 64, 96)
    facts = {"pixel_mean": model.pixel_mean.flatten().tolist()}
    export_model(model, image, path, "torch_export", facts=facts, dynamic=False)
    with torch.no_grad():
        expected = model([{"image": image}])[0]["instances"]
    found = read_exported(path)([{"image": image}])[0]["instances"]
    assert len(expected) > 5
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
    torch.testing.assert_close(*boxes, rtol=0, atol=0.01)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert {name.partition("::")[0] for name in operators(path)} <= {"aten", "torchvision"}


@pytest.mark.slow
def test_raw_outputs_are_those_of_the_parts(model, tmp_path):
    path = tmp_path / "model.ts"
    image = 255 * torch.rand(3, 64, 96)
    export_model(model, image, path, "torchscript", dynamic=False, raw=True)
    assert not any(name.startswith("sasa_det") for name in operators(path))
    with torch.no_grad():
        found = torch.jit.load(path)(image)
        batch = model.preprocess_image([{"image": image}])
        features = model.backbone(batch.tensor)
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(features)
    for raw, expected in zip(found, [*features, *logits, *deltas], strict=True):
        scale = expected.abs().max().item()
        assert (raw - expected).abs().max() < 1e-4 * max(scale, 1)
    with pytest.raises(UsageError, match="--raw"):
        read_exported(path)


@pytest.mark.slow
@pytest.mark.parametrize("format", TRACED)
def test_a_classifier(format, tmp_path):
    torch.manual_seed(0)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "26"]
    model = build_model(load_config("configs/Quick/classifier_SASA.yaml", opts)).eval()
    path = tmp_path / f"model{FORMATS[format]}"
    export_model(model, 255 * torch.rand(3, 32, 32), path, format)
    exported = read_exported(path)
    for image in images().values():
        with torch.no_grad():
            expected = model([{"image": image}])[0]["scores"]
        found = exported([{"image": image}])[0]["scores"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not [name for name in operators(path) if name.startswith("sasa_det")]


def test_a_file_that_is_no_model_is_named(tmp_path):
    for suffix in FORMATS.values():
        path = tmp_path / f"model{suffix}"
        with pytest.raises(CheckpointError, match="does not exist"):
            read_exported(path)
        path.write_text("not a model")
        with pytest.raises(CheckpointError, match=f"model{suffix} cannot be read"):
            read_exported(path)


def test_a_torchscript_file_of_others_is_refused(tmp_path):
    path = tmp_path / "other.ts"
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.rand(2)), path)
    with pytest.raises(CheckpointError, match="was not written by sasa-det export"):
        read_exported(path)


def test_nothing_is_written_if_export_fails(tmp_path):
    with pytest.raises(UsageError, match="a ReLU cannot be exported"):
        export_model(torch.nn.ReLU(), torch.rand(3, 32, 32), tmp_path / "model.ts", "torchscript")
    assert not list(tmp_path.iterdir())


def test_inference_compiles_without_a_graph_break(model):
    torch._dynamo.reset()
    fused = fuse(model)

    def parts(image):
        features = fused.backbone(image)
        return fused.head([features[name] for name in fused.head_in_features])

    with torch.no_grad():
        explained = torch._dynamo.explain(parts)(torch.rand(1, 3, 64, 96))
    assert explained.graph_break_count == 0 and explained.graph_count == 1
