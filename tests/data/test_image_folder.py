"""Folders of class folders: what is read from them, what is held out, and every mistake in them."""

import hashlib
import os
import re
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torchvision.datasets import ImageFolder

from sasa_det.data import (
    DatasetError,
    check_image_folders,
    hold_out,
    num_classes_of,
    register_image_folder,
)
from sasa_det.data.image_folder import register_class_folders

PIXEL = Image.fromarray(np.zeros((4, 6, 3), np.uint8))


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIXEL.save(folder / name)


@pytest.fixture(autouse=True)
def catalogs():
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    fill(root / "train", ["cat/b.png", "cat/a.JPEG", "ant/deep/er/c.png", "ant/d.webp"])
    fill(root / "val", ["ant/1.png", "cat/2.png"])
    (root / "train" / "cat" / "notes.txt").touch()
    (root / "train" / "README").touch()
    return root


def test_folders_are_registered_under_their_paths_with_sorted_classes(root):
    names = register_image_folder(root)
    assert names == (f"{root}/train", f"{root}/val")
    records = DatasetCatalog.get(names[0])
    assert [(record["image_id"], record["label"]) for record in records] == [
        ("ant/d.webp", 0),
        ("ant/deep/er/c.png", 0),
        ("cat/a.JPEG", 1),
        ("cat/b.png", 1),
    ]
    for record in records:
        assert record["file_name"] == f"{root}/train/{record['image_id']}"
    for name in names:
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["ant", "cat"]
        assert (metadata.evaluator_type, metadata.image_root) == ("classification", name)
    assert num_classes_of(names) == 2
    assert register_image_folder(f"{root}/") == names


def test_hidden_files_and_those_of_other_programs_are_no_data(root, caplog):
    names = [f"{root}/train", f"{root}/val"]
    expected = []
    for name in register_image_folder(root):
        expected.append([dict(record) for record in DatasetCatalog.get(name)])
    for split in ("train", "val"):
        fill(
            root / split,
            [
                ".ipynb_checkpoints/a-checkpoint.png",
                ".git/a.png",
                "__MACOSX/cat/._a.png",
                "@eaDir/thumb.jpg",
                "cat/.ipynb_checkpoints/a-checkpoint.png",
                "cat/.hidden.png",
                "cat/._2.png",
                "cat/@eaDir/2.png/SYNOPHOTO_THUMB_M.jpg",
                "ant/deep/__MACOSX/er/._c.jpg",
            ],
        )
        for name in (".DS_Store", "Thumbs.db", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini"):
            (root / split / name).touch()
        # What is not read may be anything.
        (root / split / "cat" / ".link.png").symlink_to("/etc/passwd")
        (root / split / ".link").symlink_to("/etc")
        (root / split / "cat" / ".around").symlink_to(root / split)
    check_image_folders(names)
    for name, records in zip(names, expected, strict=True):
        assert [dict(record) for record in DatasetCatalog.get(name)] == records
        assert MetadataCatalog.get(name).thing_classes == ["ant", "cat"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message for message in warnings if message.startswith(names[0])] == [
        f"{names[0]}: left out '.git', '.ipynb_checkpoints', '.link', '@eaDir', '__MACOSX' and 7 "
        "more, hidden or made by other programs"
    ]


def test_a_folder_may_be_in_a_hidden_one(root, tmp_path):
    os.makedirs(tmp_path / ".cache" / "__MACOSX")
    os.rename(root, tmp_path / ".cache" / "__MACOSX" / "set")
    names = register_image_folder(tmp_path / ".cache" / "__MACOSX" / "set")
    assert [len(DatasetCatalog.get(name)) for name in names] == [4, 2]


def test_without_a_check_nothing_is_read_before_it_is_asked_for(tmp_path, root):
    late = tmp_path / "late"
    train, val = register_image_folder(late, check=False)
    shutil.copytree(root, late)
    assert len(DatasetCatalog.get(val)) == 2
    assert MetadataCatalog.get(val).thing_classes == ["ant", "cat"]
    assert MetadataCatalog.get(train).get("thing_classes") is None
    assert num_classes_of([train]) == 2


def test_order_is_that_of_torchvision(root):
    fill(root / "train", ["ant/deep.png", "ant/deep-er/a.png", "ant/deep/z.png", "ant-lion/a.png"])
    fill(root / "val", ["ant-lion/a.png"])
    train, _ = register_image_folder(root)
    expected = ImageFolder(train)
    assert MetadataCatalog.get(train).thing_classes == expected.classes
    records = DatasetCatalog.get(train)
    assert [(r["file_name"], r["label"]) for r in records] == expected.samples
    assert len(records) == 8


def test_names_of_any_bytes_are_kept(root):
    name = os.fsdecode(b"caf\xe9\n.png")
    shutil.copy(root / "train" / "cat" / "b.png", root / "train" / "cat" / name)
    train, _ = register_image_folder(root)
    record = next(r for r in DatasetCatalog.get(train) if r["image_id"] == f"cat/{name}")
    assert os.path.isfile(record["file_name"])


def test_imagenet_is_registered_at_import_and_told_where_it_is_looked_for():
    folder = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "imagenet", "train")
    assert MetadataCatalog.get("imagenet_train").image_root == folder
    assert {"imagenet_train", "imagenet_val"} <= set(DatasetCatalog)
    if not os.path.isdir(folder):
        with pytest.raises(FileNotFoundError, match=r"'imagenet_train'.*\$DETECTRON2_DATASETS"):
            check_image_folders(["imagenet_train", "imagenet_val"])


def move(source, target):
    return lambda root: os.rename(root / source, root / target)


def empty(root):
    for name in ("a.JPEG", "b.png"):
        os.remove(root / "train" / "cat" / name)


def without_classes(root):
    shutil.rmtree(root / "train")
    fill(root / "train", ["a.png"])


MISTAKES = {
    "no root": (
        move("", "../other"),
        "there is no folder '{root}/train', because there is no folder '{root}'",
    ),
    "no train": (
        move("train", "training"),
        "there is no folder '{root}/train'; '{root}' holds 'training', 'val'",
    ),
    "no val": (
        move("val", "valid"),
        "there is no folder '{root}/val'; '{root}' holds 'train', 'valid'",
    ),
    "empty root": (
        lambda root: (shutil.rmtree(root), root.mkdir()),
        "there is no folder '{root}/train'; '{root}' is empty",
    ),
    "val is a file": (
        lambda root: (shutil.rmtree(root / "val"), (root / "val").touch()),
        "'{root}/val' is not a folder",
    ),
    "no class folders": (without_classes, "'{root}/train' holds no class folders"),
    "hidden class folders": (
        lambda root: (shutil.rmtree(root / "train"), fill(root / "train", [".a/a.png"])),
        "'{root}/train' holds no class folders",
    ),
    "class of hidden images": (
        lambda root: (empty(root), fill(root / "train" / "cat", ["._a.png", ".b/c.png"])),
        "'{root}/train' has class folders without an image: 'cat' (of 2;",
    ),
    "empty class": (empty, "'{root}/train' has class folders without an image: 'cat' (of 2;"),
    "class only in val": (
        lambda root: fill(root / "val", ["dog/3.png"]),
        "'{root}/val' (3: ant, cat, dog) and dataset '{root}/train' (2: ant, cat) have different "
        "classes, 1: dog in the first alone: they must have the same ones",
    ),
    "other classes": (
        move("val/cat", "val/cow"),
        "different classes, 1: cow in the first alone and 1: cat in the second alone: they must",
    ),
    "pipe": (
        lambda root: os.mkfifo(root / "train" / "cat" / "c.png"),
        "'{root}/train/cat/c.png' is not a regular file",
    ),
    "link to a pipe": (
        lambda root: (
            os.mkfifo(root / "pipe"),
            os.symlink("../../pipe", root / "val" / "cat" / "c.png"),
        ),
        "'{root}/val/cat/c.png' is not a regular file",
    ),
    "image outside": (
        lambda root: os.symlink("/etc/passwd", root / "val" / "cat" / "c.png"),
        "'{root}/val/cat/c.png' is a link to '/etc/passwd', out of the image folder",
    ),
    "class outside": (
        lambda root: (
            fill(root.parent / "more", ["x.png"]),
            os.symlink("../../more", root / "train/dog"),
        ),
        "'{root}/train/dog' is a link to '{above}/more', out of the image folder",
    ),
    "folder like the root": (
        lambda root: (
            fill(root.parent / "set2", ["x.png"]),
            os.symlink("../../set2", root / "train/dog"),
        ),
        "is a link to '{above}/set2', out of",
    ),
    "circle": (
        lambda root: os.symlink("..", root / "train" / "cat" / "all"),
        "'{root}/train/cat/all' is a link to a folder that it is in itself",
    ),
    "circle of two": (
        lambda root: (
            os.symlink("../cat", root / "train" / "ant" / "x"),
            os.symlink("../ant", root / "train" / "cat" / "y"),
        ),
        "is a link to a folder that it is in itself",
    ),
    "link to itself": (
        lambda root: os.symlink("loop.png", root / "train" / "cat" / "loop.png"),
        "'{root}/train/cat' cannot be listed: Too many levels of symbolic links",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_and_nothing_is_registered(mistake, root):
    make, message = MISTAKES[mistake]
    make(root)
    with pytest.raises((DatasetError, FileNotFoundError)) as error:
        register_image_folder(root)
    assert message.format(root=root, above=root.parent) in str(error.value)
    assert "\n" not in str(error.value)
    assert f"{root}/train" not in DatasetCatalog and f"{root}/val" not in MetadataCatalog


def test_links_within_the_root_are_followed(root):
    os.symlink("b.png", root / "train" / "cat" / "link.png")
    os.symlink("../val/ant", root / "train" / "dog")
    fill(root / "val", ["dog/3.png"])
    train, _ = register_image_folder(root)
    found = [record["image_id"] for record in DatasetCatalog.get(train)]
    assert {"cat/link.png", "dog/1.png"} <= set(found)


def test_root_and_split_may_themselves_be_links(tmp_path, root):
    os.rename(root / "val", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / "val")
    os.symlink(root, tmp_path / "linked")
    os.symlink("1.png", root / "val" / "ant" / "link.png")
    _, val = register_image_folder(tmp_path / "linked")
    assert len(DatasetCatalog.get(val)) == 3


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(root):
    os.symlink("nowhere.png", root / "val" / "cat" / "c.png")
    _, val = register_image_folder(root)
    assert len(DatasetCatalog.get(val)) == 3


def test_a_name_stands_for_one_folder_and_its_classes(root):
    register_class_folders("pets", root / "train", class_names=["ant", "dog"])
    register_class_folders("pets", root / "train")
    register_class_folders("pets", f"{root}/val/../train/")
    with pytest.raises(DatasetError, match=f"'pets' is already registered .*'{root}/train'"):
        register_class_folders("pets", root / "val")
    with pytest.raises(DatasetError, match=r"\(2: 'ant', 'cat'\) are not .*\(2: 'ant', 'dog'\)"):
        check_image_folders(["pets"])


def test_only_data_sets_of_whole_images_are_taken(root):
    for function in (lambda name: hold_out(name, 0.5), lambda name: check_image_folders([name])):
        with pytest.raises(DatasetError, match="evaluator_type 'classification', got 'coco'"):
            function("coco_2017_val")
        with pytest.raises(
            DatasetError, match="'imagenet_trian' is not registered; did you mean imagenet_"
        ):
            function("imagenet_trian")


@pytest.fixture
def sized(tmp_path):
    """Classes of 1, 2, 3, 10 and 25 images."""
    sizes = {"a": 1, "b": 2, "c": 3, "d": 10, "e": 25}
    names = [f"{name}/{number}.png" for name, size in sizes.items() for number in range(size)]
    fill(tmp_path / "sized" / "train", names)
    register_class_folders("sized", tmp_path / "sized" / "train")
    return names


def ids(name):
    return [record["image_id"] for record in DatasetCatalog.get(name)]


@pytest.mark.parametrize(
    "fraction, held_out",
    [(0.04, "0 1 1 1 1"), (0.3, "0 1 1 3 8"), (0.5, "0 1 2 5 12"), (0.99, "0 1 2 9 24")],
)
def test_each_class_is_divided_by_the_digests_of_the_paths(sized, fraction, held_out):
    train, test = hold_out("sized", fraction)
    assert (train, test) == ("sized:train", "sized:holdout")
    expected = []
    for label, count in zip("abcde", held_out.split(), strict=True):
        members = [name for name in sized if name.startswith(label)]
        members.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        expected += members[: int(count)]
    assert sorted(ids(test)) == sorted(expected)
    # In the order of the folder, which is sorted.
    assert ids(train) == sorted(set(sized) - set(expected))
    assert [r["label"] for r in DatasetCatalog.get(test)] == [
        "abcde".index(i[0]) for i in ids(test)
    ]
    assert num_classes_of([train, test, "sized"]) == 5


def test_the_division_does_not_depend_on_place_or_order(tmp_path, sized):
    before = ids(hold_out("sized", 0.3)[1])
    fill(tmp_path / "moved", reversed(sized))
    register_class_folders("moved", tmp_path / "moved")
    assert ids(hold_out("moved", 0.3)[1]) == before
    # More is held out of a class by a larger fraction, never others.
    assert set(before) < set(ids(hold_out("sized", 0.6)[1]))


def test_the_last_division_counts_and_a_change_is_logged(sized, caplog):
    hold_out("sized", 0.3)
    hold_out("sized", 0.3)
    assert not caplog.records
    _, test = hold_out("sized", 0.5)
    assert "sized:holdout: 0.5 of each class is held out from now on, not 0.3" in caplog.messages
    assert len(ids(test)) == 20 and MetadataCatalog.get(test).holdout == 0.5


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(sized, fraction):
    with pytest.raises(ValueError, match=f"above 0 and below 1, got {re.escape(str(fraction))}"):
        hold_out("sized", fraction)


def test_any_registered_records_can_be_divided(sized):
    DatasetCatalog.register("own", lambda: list(DatasetCatalog.get("sized")))
    MetadataCatalog.get("own").set(
        evaluator_type="classification", thing_classes=list("abcde"), image_root="elsewhere"
    )
    parts = hold_out("own", 0.3)
    assert [ids(part) for part in parts] == [ids(part) for part in hold_out("sized", 0.3)]


def test_nothing_to_hold_out_is_told(tmp_path):
    fill(tmp_path / "train", ["a/1.png", "b/2.png"])
    register_class_folders("single", tmp_path / "train")
    _, test = hold_out("single", 0.5)
    with pytest.raises(DatasetError, match="'single' has one image of each class: none of them"):
        check_image_folders([test])
