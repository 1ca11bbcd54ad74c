"""Conversion with configs: of files, of the source, and none."""

import hashlib
import os
import pickle
import runpy
import sys

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from sasa_det.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from sasa_det.checkpoint.convert import build_target, convert_checkpoint
from sasa_det.engine import UsageError, load_config
from sasa_det.engine.hooks import ModelEma

TOOL = "tools/convert_checkpoint.py"
CLASSIFIER = "configs/Quick/classifier_SASA.yaml"
DETECTOR = "configs/Quick/retinanet_SASA.yaml"
RGB = {
    "format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint as a run saves it, whose averages are those of two steps."""
    cfg = load_config(CLASSIFIER)
    torch.manual_seed(0)
    model = build_model(cfg)
    ema = ModelEma(model, decay=0.5)
    folder = tmp_path_factory.mktemp("run")
    for _ in range(2):
        with torch.no_grad():
            for weight in model.state_dict().values():
                weight += 1
        ema.update()
    Checkpointer(model, str(folder), ema=ema).save("model_final", iteration=9, config=cfg.dump())
    return folder / "model_final.pth"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Return a function that runs the tool and gives status, output and errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


def refused(result, *parts):
    """Check that a mistake was told in one sentence."""
    status, _, errors = result
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert all(part in errors for part in parts), errors


def saved(path, **content):
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_classifier_s_backbone(run, tmp_path, weights):
    before = run.read_bytes()
    target = tmp_path / "a.pth"
    report = convert_checkpoint(run, target, build_target(DETECTOR), weights=weights)
    assert run.read_bytes() == before
    source = torch.load(run, weights_only=True)
    loaded = torch.load(target, weights_only=True)
    expected = dict(source["model"])
    if weights == "ema":
        averages = source["ema"]["weights"]
        expected |= {k.removeprefix("backbone."): w for k, w in averages.items()}
        # What is not trained is not averaged: each step added 1.
        assert torch.equal(loaded["model"]["stem.norm.running_mean"], torch.full((16,), 2.0))
        trained = source["model"]["stem.norm.weight"]
        assert torch.equal(loaded["model"]["stem.norm.weight"], trained - 0.5)
    others = {"iteration": "state of training", "linear.weight": "classifier"}
    assert others.items() < report.dropped.items()
    assert ("ema" in report.dropped) == (weights == "raw")
    assert all(torch.equal(w, expected[k]) for k, w in loaded["model"].items())
    assert {k for k in expected if not k.startswith("linear.")} == set(loaded.pop("model"))
    config = load_config(CLASSIFIER).dump()
    assert loaded == {
        "matching_heuristics": True,
        "preprocessing": RGB,
        "config": config,
        "config_digest": hashlib.sha256(config.encode()).hexdigest(),
    }
    assert report.preprocessing == RGB and "Preprocessing: RGB, [123.675, " in str(report)


def test_without_a_config_file_the_source_s_is_taken(run, tmp_path, tool):
    for suffix in (".pth", ".safetensors"):
        status, output, errors = tool(run, tmp_path / f"a{suffix}", "--weights", "ema")
        assert status == 0 and not errors and "| loaded" in output
        convert_checkpoint(run, tmp_path / f"b{suffix}", build_target(DETECTOR), weights="ema")
        convert_checkpoint(tmp_path / f"a{suffix}", tmp_path / f"c{suffix}")
        a, b, c = (read_checkpoint(tmp_path / f"{name}{suffix}") for name in "abc")
        for other in (b, c):
            assert list(other["model"]) == list(a["model"])
            assert all(torch.equal(w, a["model"][k]) for k, w in other["model"].items())
            assert all(other[k] == a[k] for k in a if k != "model")


def test_words_in_any_order(run, tmp_path, tool):
    opts = ["MODEL.SASA.WIDTH_MULTIPLIER", "0.25", "MODEL.RETINANET.PRIOR_PROB", "0.02"]
    orders = [
        ["--config-file", DETECTOR, run, "{}", *opts],
        [run, "{}", "--config-file", DETECTOR, *opts],
        [run, "{}", "--config-file", DETECTOR, "--weights", "raw", *opts, "--overwrite"],
    ]
    written = set()
    for n, order in enumerate(orders):
        target = tmp_path / f"{n}.pth"
        assert tool(*(str(word).format(target) for word in order))[0] == 0
        written.add(target.read_bytes())
    assert len(written) == 1


def test_a_model_of_other_widths(run, tmp_path, tool):
    width = ("MODEL.SASA.WIDTH_MULTIPLIER", "0.5")
    result = tool(run, tmp_path / "a.pth", "--config-file", DETECTOR, *width)
    refused(result, str(run), "other shapes for res2.0.attention", "(16, 16, 1, 1) in the")
    # All of them are in what is printed.
    assert "res5.0.conv3.weight" in result[1] and " of another shape." in result[1]
    assert not any(tmp_path.iterdir())


def test_what_is_allowed_by_name(run, tmp_path, tool):
    content = torch.load(run, weights_only=True)
    del content["model"]["res5.0.conv1.weight"]
    del content["model"]["res5.0.conv3.weight"]
    source, target = saved(tmp_path / "a.pth", **content), tmp_path / "b.pth"
    words = [source, target, "--allow", "res5.0.conv1.*"]
    refused(tool(*words), "it has no res5.0.conv3.weight;")
    assert not target.exists()
    status, output, _ = tool(*words, "--allow", "res5.*.conv3.weight")
    assert status == 0 and "MODEL.WEIGHTS_ALLOW \"['*res5.*.conv3.weight', '*res5" in output
    assert "or train.weights_allow with the same list in a LazyConfig" in output
    refused(tool(*words, "--overwrite", "--allow", "res6.*"), "'res6.*' of --allow matches no")


def test_resnets_of_torchvision(tmp_path, tool):
    source = tmp_path / "resnet.pth"
    layers = torchvision.models.resnet.Bottleneck, [1, 2, 4, 1]
    torch.save(torchvision.models.ResNet(*layers).state_dict(), source)
    target = tmp_path / "a.pth"
    refused(tool(source, target), str(source), "torchvision or timm", "--config-file")
    model = ["MODEL.SASA.WIDTH_MULTIPLIER", "1.0", "MODEL.SASA.STEM", "convolution"]
    model += ["MODEL.DEVICE", "cuda"]  # which need not be there
    status, output, _ = tool(source, target, "--config-file", DETECTOR, *model)
    assert status == 0 and "attention has no counterpart in a convolutional network" in output
    read = torch.load(target, weights_only=True)
    assert read["preprocessing"] == RGB and read["config"] == ""
    assert read["config_digest"] == hashlib.sha256(b"").hexdigest()
    assert "stem.conv1.weight" in read["model"] and "res5.0.conv2.weight" not in read["model"]


# -------------------------------------------------------------------------- sources without config


def wrapped(run, path, prefix, **others):
    """Write the run's weights as a trainer does that puts a prefix before their names."""
    source = torch.load(run, weights_only=True)
    weights = {f"{prefix}backbone.{name}": weight for name, weight in source["model"].items()}
    return saved(path, state_dict={**weights, **others}, config=source["config"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "a.b."])
def test_weights_behind_one_prefix(run, tmp_path, tool, prefix):
    source = wrapped(run, tmp_path / "wrapped.ckpt", prefix)
    assert tool(run, tmp_path / "a.pth")[0] == 0
    status, output, _ = tool(source, tmp_path / "b.pth")
    assert status == 0 and f"{prefix}backbone.stem." in output
    expected, read = (read_checkpoint(tmp_path / f"{name}.pth")["model"] for name in "ab")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], weight) for name, weight in expected.items())
    # As a whole it is the model's, which starts from the wrapped file as well.
    assert tool("--whole", source, tmp_path / "whole.pth")[0] == 0
    model = build_model(load_config(CLASSIFIER))
    for path in (tmp_path / "whole.pth", source):
        torch.nn.init.zeros_(model.backbone.linear.weight)
        Checkpointer(model, strict=True).load(str(path))
        for name, weight in torch.load(run, weights_only=True)["model"].items():
            assert torch.equal(model.backbone.state_dict()[name], weight), name


def test_a_prefix_that_is_named(run, tmp_path, tool):
    source = wrapped(run, tmp_path / "w.ckpt", "model.", **{"loss.weight": torch.ones(2)})
    refused(
        tool(source, tmp_path / "a.pth"), "w.ckpt: weights with names like loss.weight", "--prefix"
    )
    refused(tool(source, tmp_path / "a.pth", "--prefix", "net."), "with the prefix net.")
    refused(
        tool(source, tmp_path / "a.pth", "--prefix", "loss."), "w.ckpt: weights with names like"
    )
    status, output, _ = tool(source, tmp_path / "a.pth", "--prefix", "model.")
    assert status == 0 and "| dropped | loss.weight" in output
    assert tool(source, tmp_path / "b.pth", "--prefix", "model", "--whole")[0] == 0
    expected = torch.load(run, weights_only=True)["model"]
    names = {f"backbone.{name}" for name in expected}
    assert read_checkpoint(tmp_path / "b.pth")["model"].keys() == names


def test_without_any_config_all_weights_are_written(run, tmp_path, tool):
    weights = torch.load(run, weights_only=True)["model"]
    source = saved(tmp_path / "a.pth", model=weights, optimizer={})
    assert tool(source, tmp_path / "b.pth")[0] == 0
    read = read_checkpoint(tmp_path / "b.pth")
    assert list(read) == ["model"] and list(read["model"]) == list(weights)
    refused(tool(source, tmp_path / "c.pth", "--allow", "res5.*"), "--allow takes the config")
    # With one, preprocessing is not known.
    status, output, _ = tool(source, tmp_path / "c.pth", "--config-file", DETECTOR)
    assert status == 0 and "Preprocessing: unknown" in output
    assert "preprocessing" not in read_checkpoint(tmp_path / "c.pth")


def test_all_weights_are_written_on_request(run, tmp_path, tool):
    assert tool("--whole", run, tmp_path / "a.pth")[0] == 0
    read = read_checkpoint(tmp_path / "a.pth")
    assert "linear.weight" in read["model"]
    # What the weights expect goes with them.
    source = torch.load(run, weights_only=True)
    facts = {"preprocessing", "config", "config_digest", "matching_heuristics"}
    assert read.keys() == {"model", *facts}
    assert read["config"] == source["config"] and read["preprocessing"]["format"] == "RGB"
    words = ("--whole", run, tmp_path / "b.pth")
    refused(tool(*words, "--config-file", DETECTOR), "--whole takes no --config-file")
    refused(tool(*words, "--allow", "*"), "--whole takes no --config-file and no --allow")


# ------------------------------------------------------------------------------------- bad sources


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("MODEL: !!python/object/apply:os.system ['touch {marker}']", ["line 1", "not allowed"]),
        ("MODEL: [", ["the config in", "line 1: expected"]),
        ("SOLVER: {MAX_ITER: 3}", ["is not a yaml config with a MODEL"]),
        (
            "model: {_target_: os.system, command: 'touch {marker}'}",
            ["is not a yaml config with a"],
        ),
        ("MODEL: {RESENTS: {DEPTH: 50}}", ["MODEL.RESENTS does not exist"]),
        ("MODEL: {BACKBONE: {NAME: build_nothing}}", ["build_nothing is not registered"]),
        ("_BASE_: /etc/passwd", ["is not a yaml config with a MODEL"]),
    ],
)
def test_configs_in_checkpoints(run, tmp_path, tool, config, parts):
    marker = tmp_path / "executed"
    content = torch.load(run, weights_only=True)
    content["config"] = config.replace("{marker}", str(marker))
    source = saved(tmp_path / "a.pth", **content)
    refused(tool(source, tmp_path / "b.pth"), *parts)
    assert os.listdir(tmp_path) == ["a.pth"]


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pt", "a.pkl", "a.safetensors"])
def test_hostile_and_truncated_sources(run, tmp_path, tool, name):
    marker, source, target = tmp_path / "executed", tmp_path / name, tmp_path / "b.pth"
    hostile = Hostile(marker)
    for content in (
        pickle.dumps({"model": hostile}, protocol=2),
        run.read_bytes()[:-1000],
        b"",
    ):
        source.write_bytes(content)
        refused(tool(source, target, "--config-file", DETECTOR), str(source))
    torch.save({"state_dict": hostile}, source)
    refused(tool(source, target, "--config-file", DETECTOR), str(source))
    assert os.listdir(tmp_path) == [name]


def test_targets_and_arguments(run, tmp_path, tool):
    refused(tool(run, tmp_path / "a.pkl"), "must end in .pth or .safetensors")
    refused(tool(run, run, "--overwrite"), "is the source")
    (tmp_path / "a.pth").write_text("other")
    refused(tool(run, tmp_path / "a.pth"), "--overwrite only")
    assert (tmp_path / "a.pth").read_text() == "other"
    assert tool(run, tmp_path / "a.pth", "--overwrite")[0] == 0
    refused(tool(tmp_path / "none.pth", tmp_path / "b.pth"), "none.pth cannot be read")
    refused(tool(run, tmp_path / "b.pth", "MODEL.SASA.STEM", "convolution"), "--config-file")
    refused(tool(run, tmp_path / "b.pth", "--config-file", "none.yaml"), "none.yaml")
    refused(tool(run, tmp_path / "b.pth", "--config-file", DETECTOR, "MODEL.NONE", "1"), "NONE")


def test_from_python(run, tmp_path):
    with pytest.raises(UsageError, match="no config: --allow"):
        source = saved(tmp_path / "a.pth", model={"backbone.a": torch.ones(1)})
        convert_checkpoint(source, tmp_path / "b.pth", allow=["a"])
    with pytest.raises(CheckpointError, match="no averaged weights, .*DECAY, or train.ema.decay"):
        convert_checkpoint(source, tmp_path / "b.pth", build_target(DETECTOR), weights="ema")
