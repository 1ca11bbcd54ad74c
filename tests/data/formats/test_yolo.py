"""YOLO data sets: exact boxes, the layouts that people have, and what is wrong named by file."""

import os

import pytest

from sasa_det.data import DatasetError
from sasa_det.data import coco_entries as problems
from sasa_det.data.formats.yolo import label_path, read_yolo, yolo_splits


def test_boxes_are_in_pixels_of_the_image_files(yolo, objects_of, images_of):
    converted = yolo.read()
    assert converted.image_root == str(yolo.root / "images" / "train")
    assert objects_of(converted) == [
        ("a.jpg", "car", [15, 15, 30, 10], 300, 0),
        ("a.jpg", "tree", [12, 26, 6, 8], 48, 0),
    ]
    assert list(images_of(converted)) == ["a.jpg", "b.jpg"]
    assert [(c["id"], c["name"]) for c in converted.content["categories"]] == [
        (1, "tree"),
        (2, "car"),
    ]
    assert not converted.problems
    assert objects_of(yolo.read("val")) == [("c.jpg", "tree", [0, 0, 60, 40], 2400, 0)]


def test_polygons_become_masks_and_the_boxes_around_them(yolo, objects_of):
    yolo.text("labels/val/c.txt", "1 0.1 0.1 0.5 0.1 0.5 0.6\n0 0 0 1 0 1 1 0 1")
    converted = yolo.read("val")
    assert objects_of(converted) == [
        ("c.jpg", "car", [6, 4, 24, 20], 240, 0),  # the half of the box
        ("c.jpg", "tree", [0, 0, 60, 40], 2400, 0),
    ]
    (polygon,) = converted.content["annotations"][0]["segmentation"]
    assert polygon == pytest.approx([6, 4, 30, 4, 30, 24])


def test_keypoints_are_not_taken_for_a_polygon(yolo, objects_of):
    yolo.text("data.yaml", "train: images/val\nnames: [tree]\nkpt_shape: [2, 3]\n")
    yolo.text("labels/val/c.txt", "0 .5 .5 .5 .5 .1 .1 2 .9 .9 0\n0 .5 .5 .5 .5\n")
    converted = yolo.read()
    assert objects_of(converted) == [("c.jpg", "tree", [15, 10, 30, 20], 600, 0)]
    assert "has 5 numbers; it must have the class index, 4 of a box and 6 of keypoints" in str(
        converted.problems
    )


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("2 .5 .5 .1 .1", "UNKNOWN_CLASS", "has the class index 2; it must be one of 0 to 1, for "),
        ("-1 .5 .5 .1 .1", "UNKNOWN_CLASS", "has the class index -1; it must be one of 0 to 1"),
        ("0.5 .5 .5 .1 .1", "UNKNOWN_CLASS", "has the class index 0.5; it must be one of 0 to 1"),
        ("tree .5 .5 .1 .1", "BAD_OBJECT", "has 'tree' where a number is needed"),
        ("0 nan .5 .1 .1", "BAD_OBJECT", "has 'nan' where a number is needed"),
        ("0 .5 .5 inf .1", "BAD_OBJECT", "has 'inf' where a number is needed"),
        ("0 .5 .5", "BAD_OBJECT", "has 3 numbers; it must have the class index and 4 of a box"),
        ("0 .5 .5 .1 .1 .9", "BAD_OBJECT", "has 6 numbers; it must have the class index and 4"),
        ("0", "BAD_OBJECT", "has 1 numbers; it must have the class index and 4 of a box"),
        ("0 30 20 10 10", "BAD_OBJECT", "has 30; it must be a fraction of the image's width or"),
        ("0 .5 .5 -.1 .1", "BAD_OBJECT", "has -0.1; it must be a fraction of the image's width"),
    ],
)
def test_a_wrong_line_is_named(yolo, objects_of, faults_of, line, kind, message):
    yolo.text("labels/train/a.txt", f"1 0.5 0.5 0.5 0.25\n{line}\n")
    converted = yolo.read()
    assert objects_of(converted) == [("a.jpg", "car", [15, 15, 30, 10], 300, 0)]
    (fault,) = faults_of(converted)
    assert fault.startswith("{}/labels/train/a.txt line 2 " + message)
    assert converted.problems[0].kind == getattr(problems, kind)


def test_all_files_that_are_missing_broken_or_left_over_are_named(yolo, faults_of, images_of):
    os.unlink(yolo.root / "labels/train/b.txt")
    yolo.text("labels/train/lost.txt", "0 .5 .5 .1 .1")
    yolo.text("images/train/broken.png", "no image")
    (yolo.root / "labels/train/a.txt").write_bytes(b"0 \xff")
    converted = yolo.read()
    assert faults_of(converted) == [
        "{}/labels/train/a.txt is not UTF-8 text",
        "image {}/images/train/b.jpg has no label file {}/labels/train/b.txt",
        "image {}/images/train/broken.png is not an image",
        "{}/labels/train/lost.txt has no image",
    ]
    assert [p.kind for p in converted.problems] == [
        problems.UNREADABLE_ANNOTATIONS,
        problems.MISSING_ANNOTATIONS,
        problems.UNREADABLE,
        problems.UNUSED_ANNOTATIONS,
    ]
    assert converted.num_left_out == 1 and list(images_of(converted)) == ["a.jpg", "b.jpg"]


def test_lists_and_several_folders(yolo, objects_of, faults_of):
    """Lines are relative to the list, as ./images, or to the root of the data."""
    yolo.text("lists/train.txt", f"../images/train/a.jpg\nimages/val/c.jpg\n{yolo.root}/no.jpg\n")
    yolo.text("data.yaml", "train: [lists/train.txt, images/train]\nnames: [tree, car]\n")
    converted = yolo.read()
    assert converted.image_root == str(yolo.root / "images")
    assert [entry[0] for entry in objects_of(converted)] == ["train/a.jpg"] * 2 + [
        "val/c.jpg",
        *["train/a.jpg"] * 2,
    ]
    assert faults_of(converted) == ["{}/lists/train.txt line 3: image {}/no.jpg does not exist"]
    assert converted.problems[0].kind == problems.MISSING_FILE


@pytest.mark.parametrize("place", ["absolute", "relative", "working directory", "roboflow"])
def test_the_places_that_a_data_yaml_gives(yolo, monkeypatch, place):
    path = {"absolute": str(yolo.root), "relative": "..", "working directory": "here/data"}
    names, train = "names: [tree, car]\n", "images/train"
    yaml_file = "config/data.yaml"
    if place == "working directory":
        (yolo.root / "here").mkdir()
        (yolo.root / "here" / "data").symlink_to(yolo.root)
        monkeypatch.chdir(yolo.root)
    if place == "roboflow":
        yaml_file, train = "data.yaml", "../images/train"
    root = f"path: {path[place]}\n" if place in path else ""
    yaml_file = yolo.text(yaml_file, f"{root}train: {train}\n{names}")
    assert len(read_yolo(yaml_file, "train").content["annotations"]) == 2


def test_links_to_images_are_followed(yolo, objects_of):
    """Splits are often folders of links."""
    (yolo.root / "split/images").mkdir(parents=True)
    (yolo.root / "split/labels").symlink_to(yolo.root / "labels/train")
    (yolo.root / "split/images/a.jpg").symlink_to(yolo.root / "images/train/a.jpg")
    yolo.text("data.yaml", "train: split/images\nnames: [tree, car]\n")
    converted = yolo.read()
    assert len(objects_of(converted)) == 2
    (image,) = converted.content["images"]
    path = os.path.join(converted.image_root, image["file_name"])
    assert path == str(yolo.root / "images/train/a.jpg")


def test_the_label_file_of_an_image():
    assert label_path("/images/d/images/x.y.png") == "/images/d/labels/x.y.txt"
    assert label_path("/data/x.jpg") == "/data/x.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a", "data.yaml, line 1 is not YAML: "),
        ("- a", "data.yaml must hold the keys of a YOLO data.yaml (path, train, val, names), not "),
        ("train: images/train", "names must be a list of class names, or a dict of them by class"),
        ("names: []\ntrain: images/train", "names must be a list of class names, or a dict"),
        ("names: {1: a}\ntrain: x", "the keys of names must be the class indices 0 to 0, got [1]"),
        ("names: [a]\nval: images/val", "data.yaml has no split 'train'; it has val"),
        ("names: [a]\ntrain: 5", "train must name a folder or a text file of images, or a list"),
        ("names: [a]\ntrain: labels", "train folder {}/labels has no images"),
        ("names: [a]\ntrain: imgs", "train 'imgs' does not exist (looked for {}/imgs)"),
        ("names: [a]\ntrain: x\npath: 3", "path must be a folder, got 3"),
        ("names: [a]\ntrain: x\nkpt_shape: 3", "kpt_shape must be two integers, got 3"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(yolo, text, message):
    yolo.text("data.yaml", text)
    with pytest.raises((DatasetError, FileNotFoundError)) as error:
        yolo.read()
    assert str(error.value).startswith(f"{yolo.root}/data.yaml")
    assert message.replace("{}", str(yolo.root)) in str(error.value)


def test_names_that_yaml_takes_for_other_things(yolo):
    yolo.text("data.yaml", "train: images/train\nnames: [1, yes, tree]\n")
    names = [category["name"] for category in yolo.read().content["categories"]]
    assert names == ["1", "True", "tree"]
    assert yolo_splits(yolo.yaml) == ["train"]
