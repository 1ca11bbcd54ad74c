"""Small data sets in several formats, written by the tests."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sasa_det.data.formats import read_voc, read_yolo


class Folder:
    """Writes the files of a data set below a folder."""

    def __init__(self, root):
        self.root = root

    def image(self, name, size=(60, 40), **options):
        path = self._path(name)
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path, **options)
        return str(path)

    def text(self, name, content):
        path = self._path(name)
        path.write_text(content, encoding="utf-8")
        return str(path)

    def json(self, name, content):
        return self.text(name, json.dumps(content))

    def xml(self, name, objects=(), size=(60, 40), filename=None):
        """Write a VOC file; an object is a name, four numbers, and whether it is difficult."""
        filename = filename or f"{Path(name).stem}.jpg"
        entries = "".join(
            f"<object><name>{name}</name><pose>Left</pose><difficult>{int(difficult)}</difficult>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
            "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2"
            "</ymax></bndbox></part></object>"
            for name, (x0, y0, x1, y1), difficult in objects
        )
        return self.text(
            name,
            f"<annotation><filename>{filename}</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height><depth>3</depth></size>{entries}</annotation>",
        )

    def _path(self, name):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def yolo(folder):
    """Two images to train on, one of them with two objects, and one to test on."""
    for name in ("train/a", "train/b", "val/c"):
        folder.image(f"images/{name}.jpg")
    folder.text("labels/train/a.txt", "1 0.5 0.5 0.5 0.25\n\n0 0.25 0.75 0.1 0.2\n")
    folder.text("labels/train/b.txt", "")
    folder.text("labels/val/c.txt", "0 0.5 0.5 1 1")
    folder.yaml = folder.text(
        "data.yaml", "train: images/train\nval: images/val\nnames: {0: tree, 1: car}\n"
    )
    folder.read = lambda split="train": read_yolo(folder.yaml, split)
    return folder


@pytest.fixture
def voc(folder):
    """A VOC folder with two images in train and one in val."""
    for name in "abc":
        folder.image(f"JPEGImages/{name}.jpg")
    folder.xml(
        "Annotations/a.xml", [("tree", (1, 1, 60, 40), False), ("car", (11, 5, 20, 25), True)]
    )
    folder.xml("Annotations/b.xml")
    folder.xml("Annotations/c.xml", [("bus", (3, 4, 5, 6), False)])
    folder.text("ImageSets/Main/train.txt", "a\nb\n")
    folder.text("ImageSets/Main/val.txt", "c\n")
    folder.text("ImageSets/Main/tree_train.txt", "a  1\nb -1\n")
    folder.read = lambda split="train": read_voc(str(folder.root), split)
    return folder


@pytest.fixture
def images_of():
    return lambda converted: {i["file_name"]: i for i in converted.content["images"]}


@pytest.fixture
def objects_of():
    """Return a function that lists (file name, class, box, area, iscrowd) of all objects."""

    def objects(converted):
        content = converted.content
        files = {image["id"]: image["file_name"] for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        return [
            (
                files[entry["image_id"]],
                names[entry["category_id"]],
                pytest.approx(entry["bbox"], abs=1e-9),
                pytest.approx(entry["area"], abs=1e-6),
                entry["iscrowd"],
            )
            for entry in content["annotations"]
        ]

    return objects


@pytest.fixture
def faults_of(folder):
    """Return a function that lists the faults, with {} for the folder."""

    def faults(converted):
        return [p.message.replace(str(folder.root), "{}") for p in converted.problems]

    return faults
