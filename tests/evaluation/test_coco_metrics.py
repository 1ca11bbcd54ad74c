"""The names of metrics, held against those of an evaluation."""

import json

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from sasa_det.evaluation.coco import coco_evaluator, coco_metrics

KEYPOINTS = [10, 10, 2] * 17


@pytest.mark.parametrize(
    "class_names", [["cat"], ["cat", "a/b"], ["cat", "a/b", "AP50", "", "naïve -1"]]
)
def test_metrics_are_those_of_an_evaluation(class_names, tmp_path):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 4:24, 4:24] = True
    annotation = {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0,
        "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]], "keypoints": KEYPOINTS, "num_keypoints": 17,
    }  # fmt: skip
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}],
        "annotations": [annotation],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, 1)],
    }
    json_file = tmp_path / "data.json"
    json_file.write_text(json.dumps(content))
    MetadataCatalog.get(str(json_file)).set(
        json_file=str(json_file),
        thing_classes=class_names,
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(class_names))},
    )
    found = Instances(
        (64, 64),
        pred_boxes=Boxes(torch.tensor([[4.0, 4.0, 24.0, 24.0]])),
        scores=torch.ones(1),
        pred_classes=torch.zeros(1, dtype=torch.long),
        pred_masks=mask,
        pred_keypoints=torch.tensor(KEYPOINTS).float().view(1, 17, 3),
    )
    evaluator = coco_evaluator(str(json_file), str(tmp_path))
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    results = evaluator.evaluate()
    assert results.keys() == {"bbox", "segm", "keypoints"}
    for task, metrics in results.items():
        assert list(metrics) == coco_metrics(task, class_names)
        assert metrics["AP50"] == pytest.approx(100)
    assert ("AP-cat" in results["bbox"]) == (len(class_names) > 1)
    assert "APs" not in results["keypoints"]
