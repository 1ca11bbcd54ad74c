"""The embedded classification set: what it shows, of which digits, and when it is written."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from sasa_det.data import check_image_folders, num_classes_of, register_digit_crops, split_digits
from sasa_det.data import digits as digit_crops_module
from sasa_det.data.digit_drawing import draw_background, load_digits
from sasa_det.data.digits import compose_crop, write_digit_crops

SMALL = {"num_train": 24, "num_val": 12, "seed": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_digit_crops(tmp_path_factory.mktemp("crops") / "set", **SMALL)


@pytest.fixture
def registered(tmp_path):
    register_digit_crops(tmp_path / "set", name="small", **SMALL)
    yield tmp_path / "set"
    for split in ("train", "val"):
        DatasetCatalog.remove(f"small_{split}")
        MetadataCatalog.remove(f"small_{split}")


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_classes_are_balanced_and_images_of_one_size(written):
    for split, count in (("train", 24), ("val", 12)):
        folders = sorted((written / split).iterdir())
        assert [folder.name for folder in folders] == list("0123456789")
        sizes = [len(list(folder.iterdir())) for folder in folders]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
        for path in (written / split).rglob("*.png"):
            assert np.asarray(Image.open(path)).shape == (64, 64, 3)


def test_same_arguments_give_same_bytes_and_a_small_set_begins_a_larger_one(written, tmp_path):
    first = contents(written)
    assert contents(write_digit_crops(tmp_path / "again", **SMALL)) == first
    larger = contents(write_digit_crops(tmp_path / "larger", **{**SMALL, "num_train": 30}))
    other = contents(write_digit_crops(tmp_path / "other", **{**SMALL, "seed": 4}))
    images = [name for name in first if name.endswith(".png")]
    assert all(larger[name] == first[name] for name in images)
    assert not any(other[name] == first[name] for name in images)


def test_each_split_draws_its_own_digits_and_those_of_the_class(tmp_path, monkeypatch):
    source, labels = load_digits()
    numbers = {digit.tobytes(): number for number, digit in enumerate(source)}
    drawn = []

    def watched(digit, *rest):
        drawn.append(numbers[digit.tobytes()])
        return compose_crop(digit, *rest)

    monkeypatch.setattr(digit_crops_module, "compose_crop", watched)
    write_digit_crops(tmp_path / "set", **SMALL)
    train, val = (set(part.tolist()) for part in split_digits(SMALL["seed"]))
    for own, part in ((drawn[:24], train), (drawn[24:], val)):
        assert [labels[number] for number in own] == [i % 10 for i in range(len(own))]
        assert part.issuperset(own)


def test_a_whole_digit_stands_out():
    source, _ = load_digits()
    weights = np.array([0.299, 0.587, 0.114])
    heights = []
    for number in range(200):
        rng = np.random.default_rng(number)
        background = draw_background(64, rng)
        image, ink = compose_crop(source[number], background, rng)
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        heights.append(rows[-1] - rows[0] + 1)
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        level = (background @ weights)[box].mean()
        assert np.percentile((image @ weights)[ink] - level, 90) >= 60
        assert np.array_equal(image[~ink], background[~ink])
    assert 34 <= min(heights) <= 40 and 56 <= max(heights) <= 64


def test_existing_set_is_reused_only_with_the_same_parameters(written, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in written.rglob("*")}
    assert write_digit_crops(written, **SMALL) == written
    assert {p: p.stat().st_mtime_ns for p in written.rglob("*")} == before
    with pytest.raises(ValueError, match=r"was written with .*'seed': 3.*requested .*'seed': 9"):
        write_digit_crops(written, **{**SMALL, "seed": 9})
    (tmp_path / "photo.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="is not a digits classification set .*info.json"):
        write_digit_crops(tmp_path, **SMALL)
    assert contents(tmp_path) == {"photo.png": b"precious"}
    parameters = json.loads((written / "info.json").read_text())["info"]["parameters"]
    assert parameters == {**SMALL, "version": digit_crops_module.GENERATOR_VERSION}


@pytest.mark.parametrize("name, value", [("num_train", 9), ("num_val", 1.5), ("seed", -1)])
def test_arguments_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d+, got {value}"):
        write_digit_crops(tmp_path / "set", **{name: value})
    assert os.listdir(tmp_path) == []


def test_registering_writes_nothing_and_knows_the_classes(registered):
    names = ["small_train", "small_val"]
    assert num_classes_of(names) == 10
    register_digit_crops(registered, name="small", **SMALL)
    assert not registered.exists()
    check_image_folders(names)
    assert [len(DatasetCatalog.get(name)) for name in names] == [24, 12]
    for record in DatasetCatalog.get("small_val"):
        assert os.path.isfile(record["file_name"]) and record["image_id"][0] == str(record["label"])


def test_importing_registers_the_default_set():
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"digit_crops_{split}")
        assert f"digit_crops_{split}" in DatasetCatalog
        assert metadata.image_root == os.path.join(root, "digit_crops", split)
        assert metadata.thing_classes == list("0123456789")
