"""Data sets whose classes come in another order than a model's."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from sasa_det.data import DatasetError, register_coco
from sasa_det.data.catalog import check_same_classes, follow_classes
from sasa_det.evaluation.coco import coco_evaluator

IDS = {"cat": 3, "dog": 5, "owl": 9}


@pytest.fixture
def register(tmp_path, request):
    """Return a function that registers an image with a cat, two dogs and no owl."""
    (tmp_path / "image.png").write_bytes(b"")

    def add(name, ids, **options):
        boxes = [("cat", 10), ("dog", 20), ("dog", 30)]
        content = {
            "info": {},
            "images": [{"id": 1, "file_name": "image.png", "height": 100, "width": 100}],
            "categories": [{"id": identity, "name": name} for name, identity in ids.items()],
            "annotations": [
                {"id": number, "image_id": 1, "category_id": ids[class_name], "iscrowd": 0,
                 "bbox": [corner, corner, 8, 8], "area": 64}
                for number, (class_name, corner) in enumerate(boxes, 1)
            ],
        }  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        name = f"{request.node.name}_{name}"
        register_coco(name, path, tmp_path, check=False)
        return name

    return add


def classes_by_corner(name):
    [record] = DatasetCatalog.get(name)
    names = MetadataCatalog.get(name).thing_classes
    return [(names[a["category_id"]], a["bbox"][0]) for a in record["annotations"]]


def test_indices_follow_a_model_and_names_stay(register, caplog):
    name = register("a", IDS)
    before = classes_by_corner(name)
    follow_classes([name], ["owl", "cat", "dog"], "the weights")
    for _ in range(2):  # it is loaded for every evaluation
        indices = [a["category_id"] for a in DatasetCatalog.get(name)[0]["annotations"]]
        assert indices == [1, 2, 2]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["owl", "cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 1, 5: 2, 9: 0}
    assert classes_by_corner(name) == before == [("cat", 10), ("dog", 20), ("dog", 30)]
    assert "come in another order than those of the weights" in caplog.text
    # Another model, and then one with the order of the file.
    for classes in (["dog", "owl", "cat"], ["cat", "dog", "owl"]):
        follow_classes([name], classes, "the weights")
        assert classes_by_corner(name) == before
        assert metadata.thing_classes == classes


def test_data_that_are_used_together_follow_the_first(register):
    first = register("a", IDS)
    other = register("b", {"dog": 1, "owl": 2, "cat": 3})
    follow_classes([first, other])
    indices = [
        [a["category_id"] for a in DatasetCatalog.get(name)[0]["annotations"]]
        for name in (first, other)
    ]
    assert indices == [[0, 1, 1], [0, 1, 1]]


def test_what_is_registered_by_other_code(request):
    """Whose metadata are set once, and not again by loading."""
    name = request.node.name
    records = [{"file_name": "a", "annotations": [{"category_id": 0}, {"category_id": 1}]}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], thing_colors=[(1, 1, 1), (2, 2, 2)])
    follow_classes([name], ["b", "a"], "the weights")
    for _ in range(2):
        assert [a["category_id"] for a in DatasetCatalog.get(name)[0]["annotations"]] == [1, 0]
    metadata = MetadataCatalog.get(name)
    assert (metadata.thing_classes, metadata.thing_colors) == (["b", "a"], [(2, 2, 2), (1, 1, 1)])
    assert records[0]["annotations"][0] == {"category_id": 0}


def test_images_to_classify(request):
    name = request.node.name
    DatasetCatalog.register(name, lambda: tuple({"label": label} for label in (0, 2, 1)))
    MetadataCatalog.get(name).thing_classes = ["a", "b", "c"]
    follow_classes([name], ["c", "a", "b"], "the weights")
    assert [record["label"] for record in DatasetCatalog.get(name)] == [1, 0, 2]


@pytest.mark.parametrize(
    "names, message",
    [
        (["cat", "dog"], "2: cat, dog.*different classes, 1: owl in the first alone"),
        (["cat", "dog", "cow"], "1: owl in the first alone and 1: cow in the second alone"),
        (["cat", "cat", "dog"], "different classes"),
    ],
)
def test_other_classes_are_refused_by_name(register, names, message):
    name = register("a", IDS)
    DatasetCatalog.get(name)
    with pytest.raises(DatasetError, match=message):
        check_same_classes([name], names, "the weights")
    follow_classes([name], names, "the weights")
    with pytest.raises(DatasetError, match=message):
        DatasetCatalog.get(name)


def test_precision_of_each_class_has_its_name(register):
    """A model that finds cats alone, whatever the order of its classes."""
    name = register("a", IDS)
    follow_classes([name], ["owl", "dog", "cat"], "the weights")
    records = DatasetCatalog.get(name)
    evaluator = coco_evaluator(name)
    evaluator.reset()
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 18.0, 18.0]]))
    found.scores, found.pred_classes = torch.ones(1), torch.tensor([2])
    evaluator.process([{"image_id": records[0]["image_id"]}], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP-cat"] == pytest.approx(100)
    assert metrics["AP-dog"] == 0
    assert metrics["AP"] == pytest.approx(50)
