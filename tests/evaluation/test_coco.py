"""COCO's AP of as many detections as the model gives."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from sasa_det.config.lazy import load_lazy_config
from sasa_det.data import register_coco
from sasa_det.engine import Trainer, load_config
from sasa_det.engine.trainer import LazyTrainer
from sasa_det.evaluation.coco import coco_evaluator

# Objects of one image, none of which overlaps another one.
NUMBER = 150


@pytest.fixture
def crowded(tmp_path):
    """An image of many small objects in two classes, registered, and its boxes."""
    boxes = [[x, y, 3, 3] for y in range(0, 60, 4) for x in range(0, 40, 4)][:NUMBER]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": 0}
        for i, box in enumerate(boxes, 1)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 40}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dot"}, {"id": 2, "name": "line"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(tmp_path / "a.png")
    register_coco("crowded", tmp_path / "set.json", tmp_path)
    yield torch.tensor(boxes, dtype=torch.float32)
    DatasetCatalog.remove("crowded")
    MetadataCatalog.remove("crowded")


def results_of(evaluator, boxes):
    """Return the metrics where all objects were found, exactly."""
    DatasetCatalog.get("crowded")
    found = Instances((60, 40))
    found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
    found.scores = torch.linspace(0.9, 0.1, NUMBER)
    found.pred_classes = torch.zeros(NUMBER, dtype=torch.int64)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize(("allowed", "counted"), [(10, 100), (100, 100), (120, 120), (150, 150)])
def test_ap_counts_what_the_model_gives(crowded, allowed, counted):
    """AP is the share of COCO's 101 recalls that is reached: all that is counted is right."""
    results = results_of(coco_evaluator("crowded", max_dets_per_image=allowed), crowded)
    expected = 100 * (100 * counted // NUMBER + 1) / 101
    for metric in ("AP", "AP50", "AP75", "APs", "AP-dot"):
        assert results[metric] == pytest.approx(expected), metric


def test_configs_pass_on_their_number_of_detections(crowded, tmp_path):
    yaml = "configs/Quick/retinanet_SASA.yaml"
    lazy = "configs/COCO-Detection/retinanet_SASA_R_50_full.py"
    mask = "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN"
    heads = "model.roi_heads.box_predictor.test_topk_per_image"
    folder, found = str(tmp_path), []
    for number in ("150", "100"):
        cfg = load_config(yaml, ["TEST.DETECTIONS_PER_IMAGE", number])
        found.append(Trainer.build_evaluator(cfg, "crowded", folder))
    for file, key in ((lazy, "model.max_detections_per_image"), (f"{mask}.py", heads)):
        for number in (150, 100):
            cfg = load_lazy_config(file, [f"{key}={number}"]).config
            found.append(LazyTrainer.build_evaluator(cfg, "crowded", folder))
    full = pytest.approx(100)
    cut = pytest.approx(100 * 67 / 101)
    assert [results_of(evaluator, crowded)["AP"] for evaluator in found] == [full, cut] * 3
