"""Data sets in other formats, registered: what is checked is what is trained and evaluated on."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageOps

from sasa_det.data import DatasetError, check_registered, register_coco, validate_coco
from sasa_det.data.formats import Converted
from sasa_det.data.images import image_size, read_image
from sasa_det.data.media import media_of_coco
from sasa_det.data.sources import open_converted, open_data, reading_of
from sasa_det.evaluation.coco import coco_evaluator

NAMES = ["tree", "car"]
SIZE = 64, 48
BOXES = {
    "a": [(0, (0, 0, 16, 24)), (1, (8, 12, 40, 36)), (1, (32, 6, 64, 48))],
    "b": [(1, (4, 4, 20, 28))],
    "c": [],
}


@pytest.fixture(scope="module")
def same_data(tmp_path_factory):
    """The words that name the same data as COCO json, YOLO data.yaml and VOC folder."""
    root = tmp_path_factory.mktemp("same")
    images, annotations = [], []
    for folder in ("images/val", "labels/val", "JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number, (stem, objects) in enumerate(BOXES.items(), 1):
        Image.fromarray(np.full((SIZE[1], SIZE[0], 3), 80, np.uint8)).save(
            root / "images/val" / f"{stem}.jpg"
        )
        shutil.copy(root / "images/val" / f"{stem}.jpg", root / "JPEGImages")
        images.append(
            {"id": number, "file_name": f"{stem}.jpg", "width": SIZE[0], "height": SIZE[1]}
        )
        lines, entries = [], []
        for index, (x0, y0, x1, y1) in objects:
            width, height = x1 - x0, y1 - y0
            center = (x0 + x1) / 2 / SIZE[0], (y0 + y1) / 2 / SIZE[1]
            lines.append(f"{index} {center[0]} {center[1]} {width / SIZE[0]} {height / SIZE[1]}")
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True)
            bndbox = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
            entries.append(f"<object><name>{NAMES[index]}</name><bndbox>{bndbox}</bndbox></object>")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": index + 1,
                    "bbox": [x0, y0, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        (root / "labels/val" / f"{stem}.txt").write_text("\n".join(lines))
        xml = f"<annotation><filename>{stem}.jpg</filename>{''.join(entries)}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(xml)
    (root / "ImageSets/Main/val.txt").write_text("a\nb\nc")
    (root / "classes.txt").write_text("tree\ncar\n")
    (root / "data.yaml").write_text("val: images/val\nnames: [tree, car]")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "val.json").write_text(json.dumps(content))
    return {
        "coco": (str(root / "val.json"), str(root / "images/val")),
        "yolo": (str(root / "data.yaml"),),
        "voc": (str(root),),
    }


@pytest.fixture
def register(unregister):
    def call(words, use="test", **options):
        name, images = open_data(*words, use=use)
        unregister.append(name)
        register_coco(name, name, images, **options)
        return name

    return call


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_records_are_those_of_the_same_data_in_coco(same_data, register, kind):
    expected = DatasetCatalog.get(register(same_data["coco"]))
    name = register(same_data[kind])
    check_registered([name], training=False)
    records = DatasetCatalog.get(name)
    assert MetadataCatalog.get(name).thing_classes == NAMES
    for record, other in zip(records, expected, strict=True):
        file_name, other["file_name"] = record["file_name"], record["file_name"]
        assert os.path.isfile(file_name)
        for entry, true in zip(record["annotations"], other["annotations"], strict=True):
            assert entry["bbox"] == pytest.approx(true.pop("bbox"))
            entry.pop("bbox")
        assert record == other


@pytest.mark.parametrize("evaluator", [coco_evaluator, COCOEvaluator])
def test_the_same_detections_have_the_same_metrics(same_data, register, tmp_path, evaluator):
    """Not all are right, so that no metric is 100, with our evaluator and detectron2's own."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for kind, words in same_data.items():
        generator.manual_seed(0)
        name = register(words)
        evaluation = evaluator(name, output_dir=str(tmp_path / kind))
        evaluation.reset()
        for record in DatasetCatalog.get(name):
            boxes = [entry["bbox"] for entry in record["annotations"]] + [[5, 5, 9, 9]]
            boxes = torch.tensor(boxes, dtype=torch.float)
            boxes[:, 2:] += boxes[:, :2]
            boxes += 6 * torch.rand(boxes.shape, generator=generator)
            instances = Instances((record["height"], record["width"]))
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.rand(len(boxes), generator=generator)
            classes = [entry["category_id"] for entry in record["annotations"]] + [0]
            instances.pred_classes = torch.tensor(classes)
            evaluation.process([record], [{"instances": instances}])
        results[kind] = evaluation.evaluate()["bbox"]
    assert 5 < results["coco"]["AP"] < 95
    assert results["yolo"] == pytest.approx(results["coco"], nan_ok=True)
    assert results["voc"] == pytest.approx(results["coco"], nan_ok=True)


def test_predictions_are_made_on_the_same_images(same_data):
    for kind in ("yolo", "voc"):
        media, ids = media_of_coco(*open_data(*same_data[kind], use="test"))
        assert [(medium.name, medium.image_id) for medium in media] == [
            ("a.jpg", 1),
            ("b.jpg", 2),
            ("c.jpg", 3),
        ]
        assert ids == {"tree": 1, "car": 2}


def test_what_validation_refuses_training_refuses(same_data, tmp_path, register):
    data = shutil.copytree(os.path.dirname(same_data["yolo"][0]), tmp_path / "data")
    label_file = data / "labels/val/a.txt"
    label_file.write_text("0 .5 .5 .1 .1\n7 .5 .5 .1 .1\n0 1 .5 .5 .25\n0 .5 .5 0 .5\n1 .5\n")
    name, images = open_data(str(data / "data.yaml"), "val")
    report = validate_coco(name, images, training=True)
    assert [problem.message for problem in report.problems] == [
        f"{label_file} line 2 has the class index 7; it must be one of 0 to 1, for the names in "
        f"{data}/data.yaml",
        f"{label_file} line 5 has 2 numbers; it must have the class index and 4 of a box (x, y, "
        "width, height) or 6 or more of a polygon (x, y, ...)",
        f"{label_file} line 3 has bbox [48.0, 18.0, 32.0, 12.0] partly outside of the 64 x 48 "
        "image",
        f"{label_file} line 4 has bbox [32.0, 12.0, 0.0, 24.0] of no width or height",
    ]
    assert not report.is_accepted(True) and report.count("error") == 2
    message = f"{data}/data.yaml:val: {label_file} line 2 has the class index 7; .* \\(and 1 more"
    with pytest.raises(DatasetError, match=message):
        register((str(data / "data.yaml"),))
    assert name not in DatasetCatalog
    # Mended, it is read again.
    label_file.write_text("0 .5 .5 .1 .1")
    register((str(data / "data.yaml"),))
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 1
    # So it is where it was registered before.
    label_file.write_text("0 .5 .5 .1 .1\n1 .5 .5 .1 .1")
    register((str(data / "data.yaml"),))
    assert len(DatasetCatalog.get(name)[0]["annotations"]) == 2
    label_file.write_text("0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n2 .5 .5 .1 .1")
    with pytest.raises(DatasetError, match="line 3 has the class index 2"):
        register((str(data / "data.yaml"),))


def test_missing_images_are_named(same_data, tmp_path, register):
    data = shutil.copytree(same_data["voc"][0], tmp_path / "data")
    for name in "abc":
        os.unlink(data / "JPEGImages" / f"{name}.jpg")
    message = "3 of 3 image files are missing, the first is that of .*val.txt line 1: image "
    with pytest.raises(FileNotFoundError, match=message):
        register((str(data), "val"))


def test_a_process_does_not_read_again_what_it_is_told_not_to():
    reads = []

    def read():
        reads.append(1)
        return Converted({"images": [len(reads)]}, "/root", (), 0, frozenset())

    for _ in range(2):
        assert open_converted("data:once", read, reuse=True) == ("data:once", "/root")
    assert len(reads) == 1
    first = reading_of("data:once").path
    open_converted("data:once", read)
    assert len(reads) == 2 and not os.path.exists(first)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_the_size_of_an_image_is_that_of_the_turned_image(tmp_path, suffix):
    path = str(tmp_path / f"image.{suffix}")
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        image.save(path, exif=exif)
        height, width = read_image(path, 100).shape[:2]
        assert image_size(path) == (width, height)
        assert (width, height) == ImageOps.exif_transpose(Image.open(path)).size
        assert (width, height) == ((4, 6) if orientation > 4 else (6, 4))
