import hashlib
import json
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools.coco import COCO

from sasa_det.data import check_coco, check_registered, digits, register_digits
from sasa_det.data.catalog import SPLITS
from sasa_det.data.digit_drawing import load_digits as load_source
from sasa_det.data.digit_drawing import split_digits
from sasa_det.data.digits import compose_scene, write_digits
from sasa_det.errors import DatasetError

SMALL = {"num_train": 6, "num_val": 4, "seed": 3}
MEAN_COLOURS = [117.8, 104.7, 84.3, 133.9, 87.2, 140.1, 69.5, 60.5, 74.5, 116.2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "set", **SMALL)


@pytest.fixture(scope="module")
def scenes():
    source, _ = load_source()
    train, _ = split_digits(0)
    return [compose_scene(source, train, 128, np.random.default_rng(i)) for i in range(60)]


@pytest.fixture
def registered(tmp_path):
    register_digits(tmp_path / "set", name="small", **SMALL)
    yield tmp_path / "set"
    for split in ("train", "val"):
        json_file = MetadataCatalog.get(f"small_{split}").json_file
        DatasetCatalog.remove(f"small_{split}")
        MetadataCatalog.remove(f"small_{split}")
        del PathManager._path_handlers[json_file]


def load(root, split):
    return json.loads((root / f"{split}.json").read_text())


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_split_is_disjoint_complete_and_stratified():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    train, val = split_digits(5)
    assert sorted([*train, *val]) == list(range(1797))
    assert not set(train) & set(val)
    for digit in range(10):
        total = int((labels == digit).sum())
        assert int((labels[val] == digit).sum()) == round(0.2 * total)
    assert not np.array_equal(split_digits(5)[1], split_digits(6)[1])
    assert np.array_equal(split_digits(5)[1], val)


def test_a_set_for_tuning_leaves_the_validation_digits_out(tmp_path):
    train, val = split_digits(5)
    tuning_train, tuning_val = split_digits(5, tuning=True)
    assert sorted([*tuning_train, *tuning_val]) == train.tolist()
    assert not set(tuning_train) & set(tuning_val)
    assert abs(len(tuning_val) - 0.2 * len(train)) <= 5
    small = {**SMALL, "seed": 5}
    digits.write_digits(tmp_path / "set", **small, tuning=1)
    for split, allowed in (("train", tuning_train), ("val", tuning_val)):
        content = json.loads((tmp_path / "set" / f"{split}.json").read_text())
        drawn = {annotation["digit_index"] for annotation in content["annotations"]}
        assert drawn <= set(allowed.tolist())
        assert content["info"]["parameters"]["tuning"] == 1
    with pytest.raises(DatasetError, match="not with the requested"):
        digits.write_digits(tmp_path / "set", **small)


def test_same_arguments_give_same_bytes(written, tmp_path):
    again = write_digits(tmp_path / "again", **SMALL)
    first, second = contents(written), contents(again)
    assert len(first) == 6 + 4 + 2
    assert first == second


def test_the_scenes_of_this_version(written):
    """Another digest must come with another GENERATOR_VERSION: folders are reused by it."""
    scenes = [
        [(annotation["digit_index"], annotation["bbox"]) for annotation in content["annotations"]]
        for content in (load(written, split) for split in SPLITS)
    ]
    assert digits.GENERATOR_VERSION == 1
    assert hashlib.sha256(repr(scenes).encode()).hexdigest()[:16] == "fc62b19879de38ed"
    colours = [np.asarray(Image.open(path)).mean() for path in sorted(written.rglob("*.png"))]
    assert np.allclose(colours, MEAN_COLOURS, atol=0.1)


def test_other_seed_gives_other_images(written, tmp_path):
    other = contents(write_digits(tmp_path / "other", **{**SMALL, "seed": 4}))
    same = [name for name, data in contents(written).items() if other[name] == data]
    assert same == []


def test_small_set_is_the_beginning_of_a_larger_one(written, tmp_path):
    larger = contents(write_digits(tmp_path / "larger", **{**SMALL, "num_train": 8}))
    for name, data in contents(written).items():
        if name.endswith(".png"):
            assert larger[name] == data


def test_boxes_are_tight_around_what_was_painted(scenes):
    for scene in scenes:
        changed = (scene.image != scene.background).any(axis=-1)
        assert not (changed & ~scene.ink.any(axis=0)).any()
        assert scene.ink.sum(axis=0).max() == 1
        for ink, (x, y, w, h) in zip(scene.ink, scene.boxes, strict=True):
            # From the pixels that differ from the background, not from the mask's own shape.
            rows, columns = np.nonzero(changed & ink)
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


def test_overlap_count_and_scale_of_digits(scenes):
    counts, heights = set(), []
    for scene in scenes:
        counts.add(len(scene.boxes))
        heights += scene.boxes[:, 3].tolist()
        corners = np.concatenate([scene.boxes[:, :2], scene.boxes[:, :2] + scene.boxes[:, 2:]], 1)
        assert corners.min() >= 0 and corners.max() <= 128
        for i, (ax0, ay0, ax1, ay1) in enumerate(corners):
            for bx0, by0, bx1, by1 in corners[:i]:
                inter = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(
                    0, min(ay1, by1) - max(ay0, by0)
                )
                areas = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
                assert inter / (areas - inter) <= 0.05
    assert counts == {2, 3, 4, 5}
    # The soft edge of the strokes moves the box by up to two pixels from the height drawn.
    assert 22 <= min(heights) <= 27 and 56 <= max(heights) <= 67


def test_ink_stands_out_from_a_textured_background(scenes):
    weights = np.array([0.299, 0.587, 0.114])
    for scene in scenes:
        luminance = scene.background @ weights
        assert luminance.std() > 3
        for ink, (x, y, w, h) in zip(scene.ink, scene.boxes, strict=True):
            local = luminance[y : y + h, x : x + w].mean()
            # Strokes end in a soft edge: the lightest tenth is fully covered by ink.
            difference = (scene.image @ weights)[ink] - local
            assert np.percentile(difference, 90) >= 60


def test_json_holds_what_the_images_show(written):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    for number, split in enumerate(("train", "val")):
        content = load(written, split)
        expected = {**SMALL, "image_size": 128, "version": digits.GENERATOR_VERSION}
        assert content["info"]["parameters"] == expected
        assert [c["name"] for c in content["categories"]] == list("0123456789")
        assert [c["id"] for c in content["categories"]] == list(range(1, 11))
        ids = [annotation["id"] for annotation in content["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
        for annotation in content["annotations"]:
            assert annotation["category_id"] == labels[annotation["digit_index"]] + 1
            assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
            assert annotation["iscrowd"] == 0
        source, _ = load_source()
        pool = split_digits(SMALL["seed"])[number]
        for image in content["images"]:
            pixels = np.asarray(Image.open(written / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (128, 128, 3)
            rng = np.random.default_rng([SMALL["seed"], number, image["id"]])
            scene = compose_scene(source, pool, 128, rng)
            assert np.array_equal(pixels, scene.image)
            boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]]
            assert boxes == scene.boxes.tolist()
            assert all(isinstance(value, float) for box in boxes for value in box)


def test_validation_digits_never_occur_in_training(written):
    used = {s: {a["digit_index"] for a in load(written, s)["annotations"]} for s in SPLITS}
    train, val = split_digits(SMALL["seed"])
    assert used["train"] <= set(train.tolist())
    assert used["val"] <= set(val.tolist())


def test_written_set_loads_with_pycocotools_and_passes_the_check(written):
    for split, count in (("train", 6), ("val", 4)):
        json_file = written / f"{split}.json"
        coco = COCO(str(json_file))
        summary = check_coco(json_file, written / split, training=split == "train")
        assert summary.num_images == len(coco.imgs) == count
        assert summary.num_annotations == len(coco.anns)
        assert summary.class_names == tuple("0123456789")


def test_existing_set_is_reused_only_with_the_same_parameters(written):
    before = {p: p.stat().st_mtime_ns for p in written.rglob("*")}
    assert write_digits(written, **SMALL) == written
    assert {p: p.stat().st_mtime_ns for p in written.rglob("*")} == before
    with pytest.raises(ValueError, match=r"was written with .*'seed': 3.*requested .*'seed': 9"):
        write_digits(written, **{**SMALL, "seed": 9})


def test_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"precious")
    with pytest.raises(ValueError, match="is not a digits detection set"):
        write_digits(tmp_path, **SMALL)
    assert contents(tmp_path) == {"photo.png": b"precious"}


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    write_digits(tmp_path / "set", num_train=1, num_val=1)
    assert (tmp_path / "set" / "val" / "000001.png").is_file()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    compose, calls = digits.compose_scene, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compose(*args)

    monkeypatch.setattr(digits, "compose_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "set", **SMALL)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("winner_seed", [3, 4])
def test_another_process_finishing_first_is_not_broken(tmp_path, monkeypatch, winner_seed):
    root, rename, winners = tmp_path / "set", os.rename, []

    def late_rename(source, target):
        # What another process does between this one's first look and its rename.
        if not winners:
            winners.append(True)
            write_digits(root, **{**SMALL, "seed": winner_seed})
            winners.append(contents(root))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late_rename)
    if winner_seed == SMALL["seed"]:
        assert write_digits(root, **SMALL) == root
    else:
        with pytest.raises(ValueError, match="was written with"):
            write_digits(root, **SMALL)
    assert contents(root) == winners[1]
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(
    "name, value", [("num_train", 0), ("num_val", 2.0), ("image_size", 63), ("seed", -1)]
)
def test_arguments_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d+, got {value}"):
        write_digits(tmp_path / "set", **{name: value})
    assert os.listdir(tmp_path) == []


def test_image_size_scales_the_digits(tmp_path):
    root = write_digits(tmp_path / "set", num_train=20, num_val=1, image_size=256)
    heights = [annotation["bbox"][3] for annotation in load(root, "train")["annotations"]]
    assert 44 <= min(heights) <= 65 and 90 <= max(heights) <= 132
    assert load(root, "train")["images"][0]["height"] == 256


def test_registering_writes_nothing_and_may_be_repeated(registered):
    metadata = MetadataCatalog.get("small_val")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == list("0123456789")
    assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(10)}
    assert metadata.json_file == str(registered / "val.json")
    assert metadata.image_root == str(registered / "val")
    register_digits(registered, name="small", **SMALL)
    assert not registered.exists()
    with pytest.raises(ValueError, match="'small_train' is already registered"):
        register_digits(registered, name="small", **{**SMALL, "seed": 8})


def test_loading_writes_the_set(registered):
    dicts = DatasetCatalog.get("small_val")
    assert [os.path.isfile(d["file_name"]) for d in dicts] == [True] * 4
    annotations = load(registered, "val")["annotations"]
    loaded = [(a["bbox"], a["category_id"]) for d in dicts for a in d["annotations"]]
    assert loaded == [(a["bbox"], a["category_id"] - 1) for a in annotations]


def test_evaluator_finds_the_set_before_anything_is_loaded(registered, tmp_path):
    evaluator = COCOEvaluator("small_val", tasks=("bbox",), output_dir=str(tmp_path / "out"))
    assert len(evaluator._coco_api.imgs) == 4


def test_evaluating_the_ground_truth_gives_full_ap(registered):
    evaluator = COCOEvaluator("small_val", tasks=("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    for sample in DatasetCatalog.get("small_val"):
        boxes = torch.tensor([a["bbox"] for a in sample["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((128, 128), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        instances.pred_classes = torch.tensor([a["category_id"] for a in sample["annotations"]])
        evaluator.process([sample], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["AP50"] == 100


def test_check_writes_the_set(registered):
    check_registered(["small_train"], training=True)
    assert len(os.listdir(registered / "train")) == 6


def test_importing_registers_the_default_set():
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"digits_{split}")
        assert f"digits_{split}" in DatasetCatalog
        assert metadata.json_file == os.path.join(root, "digits", f"{split}.json")
