"""The command that exports, and prediction and evaluation with what it wrote."""

import json
import re
import sys

import pytest
import torch

from sasa_det.engine import Predictor, UsageError
from sasa_det.engine.export import export_parser, run_export
from sasa_det.engine.predict import predict_parser, run_predict
from sasa_det.engine.trained_model import _check_overrides
from sasa_det.export import read_exported


@pytest.fixture
def export(trained, tmp_path):
    def call(*words, weights=trained, format="torchscript"):
        words = ["--weights", weights, "--format", format, "--output", tmp_path / "out", *words]
        return run_export(export_parser().parse_args([str(word) for word in words]))

    return call


@pytest.mark.slow
def test_prediction_with_an_exported_file_is_that_of_the_checkpoint(
    export, trained, digits, tmp_path, capfd
):
    data = ["--test", digits / "train.json", digits / "train"]
    assert export("--run-eval", *data, format="onnx") == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["bbox/AP"]]
    assert float(row[1]) > 10 and float(row[2]) == pytest.approx(float(row[1]), abs=0.05)
    file = tmp_path / "out" / "model.onnx"
    images = sorted((digits / "train").glob("*.png"))
    expected = Predictor.from_checkpoint(trained, score_threshold=0.25)
    found = Predictor.from_checkpoint(file, score_threshold=0.25)
    assert found.trained.class_names == expected.trained.class_names
    assert found.trained.category_ids == expected.trained.category_ids
    for one, other in zip(found(images), expected(images), strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)
        boxes = one.pred_boxes.tensor, other.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=0.01)
        assert torch.equal(one.pred_classes, other.pred_classes)
    words = ["--weights", file, "--input", digits / "train", "--json", tmp_path / "found.json"]
    assert run_predict(predict_parser().parse_args([str(word) for word in words])) == 0
    assert json.loads((tmp_path / "found.json").read_text())
    with pytest.raises(UsageError, match="score threshold must be at least 0.05"):
        Predictor.from_checkpoint(file, score_threshold=0.01)
    with pytest.raises(UsageError, match="for an exported model has no test-time augmentation"):
        Predictor.from_checkpoint(file, opts=["TEST.AUG.ENABLED", "True"])
    with pytest.raises(UsageError, match="^TEST.DETECTIONS_PER_IMAGE is part of the exported file"):
        Predictor.from_checkpoint(file, opts=["TEST.DETECTIONS_PER_IMAGE", "1"])


@pytest.mark.parametrize(
    ("opts", "key"),
    [
        ("", None),
        ("INPUT.MIN_SIZE_TEST 64 MODEL.DEVICE cpu", None),
        ("-- INPUT.MIN_SIZE_TEST 64", None),  # behind --test
        ("-- TEST.DETECTIONS_PER_IMAGE 1", "TEST.DETECTIONS_PER_IMAGE"),
        ("MODEL.DEVICE cuda", "MODEL.DEVICE"),
        ("INPUT.FORMAT RGB MODEL.PIXEL_MEAN [0,0,0]", "MODEL.PIXEL_MEAN"),
        ("dataloader.test.mapper.image_format=RGB", None),
        ("model.test_score_thresh=0.1", "model.test_score_thresh"),
        ("dataloader.test=null ~model.backbone", "model.backbone"),
    ],
)
def test_what_is_part_of_an_exported_file_cannot_be_changed(opts, key):
    if key is None:
        _check_overrides("model.ts", opts.split(), "=" in opts)
        return
    with pytest.raises(
        UsageError, match=f"^{re.escape(key)} is part of the exported file model.ts"
    ):
        _check_overrides("model.ts", opts.split(), "=" in opts)


@pytest.mark.slow
def test_a_file_of_one_size_takes_smaller_and_larger_images(export, digits, tmp_path):
    assert export("--input-size", 96, 64, "MODEL.DEVICE", "cpu", "--overwrite") == 0
    model = read_exported(tmp_path / "out" / "model.ts")
    assert model.facts["input_size"] == [96, 64] and model.facts["classes"][3] == "3"
    for height, width in ((40, 50), (96, 64), (200, 160)):
        image = 255 * torch.rand(3, height, width)
        found = model([{"image": image, "height": height, "width": width}])[0]["instances"]
        assert found.image_size == (height, width)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input-size", "64"], "--input-size must be height and width"),
        (["--input-size", "64", "wide"], "--input-size must be height and width"),
        (["--test", "a.json", "images"], "--test is for --run-eval"),
        (["--raw", "--run-eval"], "leave --raw out"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(export, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        export(*words)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_told_with_the_nearest(export):
    with pytest.raises(UsageError, match="torch_export, onnx, got 'onx'; did you mean onnx"):
        export(format="onx")


def test_a_file_that_exists_is_not_replaced(export, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.ts").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        export()
    assert (tmp_path / "out" / "model.ts").read_text() == "mine"


def test_weights_without_a_config_are_refused(export, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "bare.pth")
    with pytest.raises(UsageError, match="holds no config"):
        export(weights=tmp_path / "bare.pth")
    with pytest.raises(UsageError, match="exported already"):
        export(weights=tmp_path / "model.onnx")


def test_a_missing_library_is_named_with_its_command(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match="pip install onnx"):
        export(format="onnx")
