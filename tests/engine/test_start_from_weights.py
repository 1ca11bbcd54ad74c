"""Runs that start from converted weights."""

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.modeling import build_model

from sasa_det.checkpoint import Checkpointer, read_checkpoint, write_checkpoint
from sasa_det.checkpoint.convert import convert_checkpoint
from sasa_det.engine import load_config
from sasa_det.engine.hooks import ModelEma

ONE_STEP = ("SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)


def test_a_detector_is_trained_from_a_classifier_s_backbone(command, tmp_path):
    cfg = load_config("configs/Quick/classifier_SASA.yaml")
    model = build_model(cfg)
    ema = ModelEma(model, decay=0.5)
    for _ in range(2):
        with torch.no_grad():
            for weight in model.state_dict().values():
                weight += 1
        ema.update()
    source = Checkpointer(model, str(tmp_path), ema=ema)
    source.save("classifier", iteration=9, config=cfg.dump())
    convert_checkpoint(tmp_path / "classifier.pth", tmp_path / "a.pth", weights="ema")
    options = (*ONE_STEP, "SOLVER.BASE_LR", 1e-8)
    assert command(*options, "MODEL.WEIGHTS", tmp_path / "a.pth") == 0
    trained = read_checkpoint(tmp_path / "run" / "model_final.pth")["model"]
    for key, weight in read_checkpoint(tmp_path / "a.pth")["model"].items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            given = trained[f"backbone.bottom_up.{key}"]
            torch.testing.assert_close(given, weight, rtol=0, atol=1e-6)
    assert yaml.safe_load(read_checkpoint(tmp_path / "a.pth")["config"])["MODEL"]["EMA"]


@pytest.mark.parametrize(
    "file",
    [
        "configs/COCO-Detection/retinanet_SASA_R_50_full.yaml",
        "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml",
    ],
)
def test_detectron2_finds_the_backbone_in_a_classifier_s_checkpoint(file, tmp_path):
    torch.manual_seed(0)
    small = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "26"]
    small += ["MODEL.SASA.WIDTH_MULTIPLIER", "0.25", "MODEL.RESNETS.NORM", "BN"]
    cfg = load_config("configs/ImageNet/SASA_R_50_full.yaml", small)
    classifier, detector = build_model(cfg), build_model(load_config(file, small))
    checkpointer = Checkpointer(classifier, str(tmp_path))
    checkpointer.save("classifier", config=cfg.dump())
    path = str(tmp_path / "classifier.pth")
    # The function by which detectron2 matches names, and its checkpointer that calls it.
    weights = read_checkpoint(path)["model"]
    expected = {f"backbone.bottom_up.{name}" for name in weights if not name.startswith("linear.")}
    matched = align_and_update_state_dicts(detector.state_dict(), weights, c2_conversion=False)
    assert expected == {name for name in matched if name in detector.state_dict()}
    DetectionCheckpointer(detector).load(path)
    assert len(expected) > 60
    for name in expected:
        given = weights[name.removeprefix("backbone.bottom_up.")]
        assert torch.equal(detector.state_dict()[name], given), name
    # The classifier itself has them in all ways.
    for load in (
        checkpointer.load,
        DetectionCheckpointer(classifier).load,
        lambda path: classifier.load_state_dict(read_checkpoint(path)["model"]),
    ):
        for weight in classifier.state_dict().values():
            weight.zero_()
        load(path)
        for name, weight in weights.items():
            assert torch.equal(classifier.state_dict()[f"backbone.{name}"], weight), name


def test_another_preprocessing_is_warned_of_once(command, tmp_path):
    model = build_model(load_config("configs/Quick/retinanet_SASA.yaml"))
    preprocessing = {
        "format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
    }
    weights = {"model": model.state_dict(), "preprocessing": preprocessing}
    write_checkpoint(weights, tmp_path / "a.pth")
    options = (*ONE_STEP, "INPUT.FORMAT", "BGR")
    assert command(*options, "MODEL.WEIGHTS", tmp_path / "a.pth") == 0
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if "in another way" in line]
    assert "WARNING" in line and line.endswith('set INPUT.FORMAT "RGB".')
