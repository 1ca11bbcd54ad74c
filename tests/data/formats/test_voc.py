"""Pascal VOC: exact boxes, both kinds of folders, and what is wrong named by file."""

import os

import pytest
from detectron2.data.datasets.pascal_voc import load_voc_instances

from sasa_det.data import DatasetError
from sasa_det.data import coco_entries as problems
from sasa_det.data.formats import read_voc, voc_splits


def test_boxes_count_pixels_from_1_and_difficult_objects_are_crowds(voc, objects_of, images_of):
    converted = voc.read()
    assert converted.image_root == str(voc.root / "JPEGImages")
    assert objects_of(converted) == [
        ("a.jpg", "tree", [0, 0, 60, 40], 2400, 0),
        ("a.jpg", "car", [10, 4, 10, 21], 210, 1),
    ]
    assert list(images_of(converted)) == ["a.jpg", "b.jpg"]
    # Those of all splits, so that each split has the same.
    names = [category["name"] for category in converted.content["categories"]]
    assert names == ["bus", "car", "tree"]
    assert objects_of(voc.read("val")) == [("c.jpg", "bus", [2, 3, 3, 3], 9, 0)]
    assert not converted.problems


def test_boxes_are_those_of_detectron2(voc):
    names = ["bus", "car", "tree"]
    expected = [
        (entry["category_id"], entry["bbox"])
        for record in load_voc_instances(str(voc.root), "train", names)
        for entry in record["annotations"]
    ]
    found = []
    for entry in voc.read().content["annotations"]:
        x, y, width, height = entry["bbox"]
        found.append((entry["category_id"] - 1, [x, y, x + width, y + height]))
    assert found == expected and len(found) == 2


def test_content_is_that_of_hotcoco(voc):
    """A library that converts whole VOC folders, in its order of the classes."""
    hotcoco = pytest.importorskip("hotcoco")
    expected = hotcoco.COCO.from_voc(str(voc.root)).dataset
    content = voc.read("").content
    for section in ("images", "annotations", "categories"):
        found = [{k: v for k, v in e.items() if k != "source"} for e in content[section]]
        assert found == [{k: e[k] for k in found[0]} for e in expected[section]]


def test_splits(voc):
    assert voc_splits(str(voc.root)) == ["train", "val"]
    # A list of one class has the images without it as well.
    assert [i["file_name"] for i in voc.read("tree_train").content["images"]] == ["a.jpg", "b.jpg"]
    assert len(voc.read("").content["images"]) == 3
    voc.image("JPEGImages/Lake 1.jpg")
    voc.xml("Annotations/Lake 1.xml", [("car", (1, 1, 5, 5), False)])
    voc.text("ImageSets/Main/val.txt", "Lake 1\n")
    assert [i["file_name"] for i in voc.read("val").content["images"]] == ["Lake 1.jpg"]
    with pytest.raises(DatasetError, match="no split 'test' in ImageSets/Main; it has train, val"):
        voc.read("test")


def test_a_folder_of_images_beside_their_files(folder, objects_of, faults_of):
    """The name in a file is used where no image is called as the file."""
    for name in ("x/a.PNG", "b.tif", "b.png", "c.jpg", "d.png"):
        folder.image(name, format="PNG")
    folder.xml("x/a.xml", [("tree", (1, 1, 10, 10), False)], filename="renamed.jpg")
    folder.xml("b.xml", [("tree", (1, 1, 20, 10), False)], filename="b.tif")
    folder.xml("other.xml", [("tree", (1, 1, 30, 10), False)], filename="C:/work/c.jpg")
    converted = read_voc(str(folder.root))
    assert objects_of(converted) == [
        ("b.tif", "tree", [0, 0, 20, 10], 200, 0),
        ("c.jpg", "tree", [0, 0, 30, 10], 300, 0),
        ("x/a.PNG", "tree", [0, 0, 10, 10], 100, 0),
    ]
    assert faults_of(converted) == [
        "image {}/b.png has no XML file",
        "image {}/d.png has no XML file",
    ]
    assert {p.kind for p in converted.problems} == {problems.UNUSED_IMAGE}
    assert [image["file_name"] for image in converted.content["images"]] == [
        "b.tif",
        "c.jpg",
        "x/a.PNG",
    ]


def test_everything_that_is_wrong_is_named(voc, faults_of):
    voc.xml("Annotations/a.xml", [("tree", ("nan", 1, 5, 5), False), ("car", ("", 1, 5, 5), False)])
    voc.text("Annotations/b.xml", "<annotation><object>")
    voc.text("Annotations/d.xml", "<annotation><object><name>car</name></object></annotation>")
    voc.image("JPEGImages/d.jpg")
    voc.xml("Annotations/e.xml", [("car", (1, 1, 5, 5), False)], size=(40, 60))
    voc.image("JPEGImages/e.jpg")
    voc.text("Annotations/f.xml", "<annotations/>")
    voc.xml("Annotations/g.xml")
    voc.text("ImageSets/Main/train.txt", "\n".join("abdefgh"))
    converted = voc.read()
    list_file = "{}/ImageSets/Main/train.txt line"
    assert faults_of(converted) == [
        "{}/Annotations/a.xml object 1 has 'nan' where a number is needed",
        "{}/Annotations/a.xml object 2 has '' where a number is needed",
        "{}/Annotations/b.xml is not XML: no element found: line 1, column 20",
        "{}/Annotations/d.xml object 1 has no <bndbox>",
        f"{list_file} 4: image {{}}/JPEGImages/e.jpg has 60 x 40 pixels, but its annotations are "
        "for 40 x 60",
        "{}/Annotations/f.xml must hold an <annotation> of Pascal VOC, not <annotations>",
        f"{list_file} 6: image {{}}/JPEGImages/g.jpg does not exist",
        f"{list_file} 7: {{}}/Annotations/h.xml does not exist",
    ]
    assert converted.num_left_out == 5
    assert {p.kind.severity for p in converted.problems} == {"error"}


def test_classes_are_those_that_a_file_lists(voc, folder, objects_of, faults_of):
    for name, text in (
        ("labelmap.txt", "# label:color\nbackground:0,0,0::\ntree:1,2,3::\ncar:::"),
        ("classes.txt", "tree\ncar\n"),
    ):
        voc.text(name, text)
        converted = voc.read()
        assert [c["name"] for c in converted.content["categories"]] == ["tree", "car"]
        assert [entry[1] for entry in objects_of(converted)] == ["tree", "car"]
    os.unlink(voc.root / "labelmap.txt")
    converted = voc.read("val")
    assert faults_of(converted) == [
        "{}/Annotations/c.xml object 1 is of class 'bus', which is not one of {}/classes.txt: "
        "tree, car"
    ]
    # Where the parts of a data set are folders, in the one above.
    folder.image("valid/v.jpg")
    folder.xml("valid/v.xml", [("car", (1, 1, 3, 3), False)])
    loose = read_voc(str(voc.root / "valid"))
    assert [c["name"] for c in loose.content["categories"]] == ["tree", "car"]


def test_a_size_of_0_is_not_known(voc):
    voc.xml("Annotations/c.xml", [("bus", (3, 4, 5, 6), False)], size=(0, 0))
    converted = voc.read("val")
    assert not converted.problems
    (image,) = converted.content["images"]
    assert (image["width"], image["height"]) == (60, 40)


def test_folders_that_cannot_be_used(folder):
    with pytest.raises(FileNotFoundError, match="data folder .*/none does not exist"):
        read_voc(str(folder.root / "none"))
    with pytest.raises(DatasetError, match="has no XML files of Pascal VOC; for COCO, give"):
        read_voc(str(folder.root))
    folder.xml("a.xml")
    with pytest.raises(DatasetError, match="no ImageSets/Main, so that there is no split 'val'"):
        read_voc(str(folder.root), "val")
