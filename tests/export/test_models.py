"""Exported R-CNNs, SAN classifiers and LazyConfig models, beside what they were made from."""

import pytest
import torch
from detectron2.modeling import build_model

from sasa_det.config.load import load_config
from sasa_det.errors import UsageError
from sasa_det.export import FORMATS, export_model, read_exported


def images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [255 * torch.rand(3, *size, generator=generator) for size in sizes]


def rcnn(*opts):
    """A small R-CNN whose heads are random enough to find objects."""
    torch.manual_seed(0)
    words = "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 26 MODEL.SASA.WIDTH_MULTIPLIER 0.25 "
    words += "MODEL.FPN.OUT_CHANNELS 32 MODEL.RPN.CONV_DIMS [32] MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    words += "MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_HEADS.NUM_CLASSES 3 "
    words += "MODEL.SASA.ATTENTION_STAGES ['res5'] MODEL.SASA.NUM_HEADS 2 "
    words += "MODEL.RPN.POST_NMS_TOPK_TEST 50 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.26"
    config = "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml"
    model = build_model(load_config(config, [*words.split(), *opts])).eval()
    predictor = model.roi_heads.box_predictor
    torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
    torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight, std=1.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("format, masks", [("torchscript", False), ("onnx", True)])
def test_an_rcnn_finds_what_the_model_finds(masks, format, tmp_path):
    model = rcnn("MODEL.MASK_ON", str(masks))
    path = tmp_path / f"model{FORMATS[format]}"
    export_model(model, *images((96, 128)), path, format, facts={"pixel_mean": [0.0] * 3})
    exported = read_exported(path)
    for image in images((64, 96), (77, 130)):
        with torch.no_grad():
            expected = model([{"image": image}])[0]["instances"]
        found = exported([{"image": image}])[0]["instances"]
        assert len(expected) > 5
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=0.01)
        assert torch.equal(found.pred_classes, expected.pred_classes)
        assert found.has("pred_masks") == masks
        if masks:
            # A pixel on the edge of a mask may round to either side.
            assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


def test_an_rcnn_is_refused_where_detectron2_cannot_export_it(tmp_path):
    model = rcnn()
    with pytest.raises(UsageError, match="use --format torchscript or onnx"):
        export_model(model, *images((64, 64)), tmp_path / "model.pt2", "torch_export")
    with pytest.raises(UsageError, match="with --raw"):
        export_model(model, *images((64, 64)), tmp_path / "model.ts", "torchscript", raw=True)
    assert not list(tmp_path.iterdir())


# Layers of each kind are exported to both formats by themselves, in test_other_exporters.py and
# layers/test_mapping.py.
@pytest.mark.slow
@pytest.mark.parametrize("format, attention", [("torchscript", "patchwise"), ("onnx", "pairwise")])
def test_a_san_classifier_takes_images_of_any_size(attention, format, tmp_path):
    torch.manual_seed(0)
    config = f"configs/ImageNet/SAN10_{attention}.yaml"
    opts = ["MODEL.DEVICE", "cpu", "MODEL.CLASSIFIER.NUM_CLASSES", "5"]
    opts += ["MODEL.SAN.WIDTH_MULTIPLIER", "0.25"]
    model = build_model(load_config(config, opts)).eval()
    path = tmp_path / f"model{FORMATS[format]}"
    export_model(model, *images((64, 64)), path, format)
    exported = read_exported(path)
    for image in images((40, 72), (96, 33)):
        with torch.no_grad():
            expected = model([{"image": image}])[0]["scores"]
        found = exported([{"image": image}])[0]["scores"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
