"""Data sets that a user registers with detectron2's functions, and their evaluators."""

import xml.etree.ElementTree as ET

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances, register_coco_instances
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from sasa_det.config.load import load_config
from sasa_det.config.options import RunOptions
from sasa_det.engine import Trainer
from sasa_det.engine.checks import check_run
from sasa_det.errors import DatasetError, UsageError
from sasa_det.evaluation.by_type import evaluator_by_type

CONFIG = "configs/Quick/retinanet_SASA.yaml"


@pytest.fixture
def register(unregister):
    """Return a function that registers a data set until the end of the test."""

    def add(name, load=None, **metadata):
        unregister.append(name)
        if load is not None:
            DatasetCatalog.register(name, load)
        return MetadataCatalog.get(name).set(**metadata)

    return add


def options_for(train, test, tmp_path, *more):
    words = ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"]
    words += ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"), *more]
    return RunOptions.read(load_config(CONFIG, words))


def test_coco_data_that_detectron2_registers_are_trained_and_evaluated(digits, register, tmp_path):
    for split in ("train", "val"):
        register(f"mine_{split}")
        register_coco_instances(
            f"mine_{split}", {}, str(digits / f"{split}.json"), str(digits / split)
        )
        assert MetadataCatalog.get(f"mine_{split}").get("thing_classes") is None
    options = options_for(
        "mine_train",
        "mine_val",
        tmp_path,
        "SOLVER.MAX_ITER",
        "2",
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        "0.0",
        "TEST.BEST_METRIC",
        "bbox/AP50",
    )
    check_run(options, Trainer)
    assert MetadataCatalog.get("mine_val").thing_classes == [str(digit) for digit in range(10)]
    results = Trainer(options.config).train()
    assert set(results["bbox"]) >= {"AP", "AP50", "AP-3"}
    # The number of classes is that of the data, whoever registers them.
    with pytest.raises(UsageError, match="NUM_CLASSES is 3 but mine_train, mine_val has 10"):
        check_run(
            options_for("mine_train", "mine_val", tmp_path, "MODEL.RETINANET.NUM_CLASSES", "3"),
            Trainer,
        )


def test_data_without_classes_after_loading_are_refused(register, tmp_path):
    register("none", lambda: [], evaluator_type="coco")
    with pytest.raises(DatasetError, match="'none' has no 'thing_classes' .* after it was loaded"):
        check_run(options_for("none", "none", tmp_path), Trainer)


def write_voc(folder, boxes):
    """Write a Pascal VOC folder of two images of a class each, as detectron2 reads it."""
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for stem, (class_name, box) in boxes.items():
        root = ET.Element("annotation")
        size = ET.SubElement(root, "size")
        thing = ET.SubElement(root, "object")
        for key, value in (("name", class_name), ("difficult", "0")):
            ET.SubElement(thing, key).text = value
        bndbox = ET.SubElement(thing, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ET.SubElement(bndbox, key).text = str(value)
        for key, value in (("width", "64"), ("height", "48"), ("depth", "3")):
            ET.SubElement(size, key).text = value
        ET.ElementTree(root).write(folder / "Annotations" / f"{stem}.xml")
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(boxes))


def test_voc_is_evaluated_with_its_own_metric(register, tmp_path):
    classes = ("cat", "dog")
    boxes = {"one": ("cat", (5, 5, 30, 30)), "two": ("dog", (10, 8, 40, 40))}
    write_voc(tmp_path, boxes)
    register(
        "voc_mine",
        lambda: load_voc_instances(str(tmp_path), "test", classes),
        thing_classes=list(classes),
        dirname=str(tmp_path),
        year=2012,
        split="test",
        evaluator_type="pascal_voc",
    )
    options = options_for("voc_mine", "voc_mine", tmp_path, "MODEL.RETINANET.NUM_CLASSES", "2")
    check_run(options, Trainer)
    evaluator = Trainer.build_evaluator(options.config, "voc_mine")
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)


def test_each_type_of_detectron2_has_its_evaluator(digits, register, tmp_path):
    register(
        "panoptic",
        evaluator_type="coco_panoptic_seg",
        json_file=str(digits / "val.json"),
        thing_classes=["a"],
        stuff_classes=["a", "b"],
        thing_dataset_id_to_contiguous_id={1: 0},
        stuff_dataset_id_to_contiguous_id={2: 1},
        ignore_label=255,
    )
    DatasetCatalog.register("panoptic", list)
    found = evaluator_by_type("panoptic", str(tmp_path))
    assert isinstance(found, DatasetEvaluators)
    kinds = (SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator)
    assert all(map(isinstance, found._evaluators, kinds))
    register("odd", list, evaluator_type="odd", thing_classes=["a"])
    with pytest.raises(
        UsageError, match="'pascal_voc' .* for AttentionRetinaNet, got 'odd': set it"
    ):
        options = options_for("digits_val", "odd", tmp_path, "MODEL.RETINANET.NUM_CLASSES", "1")
        check_run(options, Trainer, eval_only=True)
