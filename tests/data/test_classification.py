"""What a classifier sees of an image, in training and in testing, and in which batches."""

import os
import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, samplers
from PIL import Image

from sasa_det.config import add_sasa_config
from sasa_det.data import (
    ClassificationMapper,
    DatasetError,
    ImageError,
    build_classification_test_loader,
    build_classification_train_loader,
    register_image_folder,
)
from sasa_det.data.classification import build_mapper, collate_classification
from sasa_det.utils.seeding import seeded

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def record(path):
    return {"file_name": str(path), "image_id": "a/b.png", "label": 3}


@pytest.fixture
def image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return record(tmp_path / "a.png")


def channels_first(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_what_a_record_becomes(image):
    before = dict(image)
    mapped = ClassificationMapper(is_train=False)(image)
    assert mapped["image"].shape == (3, 224, 224) and mapped["image"].dtype == torch.uint8
    assert {key: mapped[key] for key in before} == before == image
    assert mapped.keys() == {"image", *before}


@pytest.mark.parametrize(
    "height, width, scaled, top, left",
    [(60, 90, (32, 48), 4, 12), (90, 60, (48, 32), 12, 4), (37, 61, (32, 52), 4, 14)],
)
def test_testing_scales_the_shorter_side_and_cuts_out_the_centre(
    tmp_path, height, width, scaled, top, left
):
    whole = Image.fromarray(np.resize(PIXELS, (height, width, 3)))
    whole.save(tmp_path / "a.png")
    resized = np.asarray(whole.resize(scaled[::-1], Image.Resampling.BILINEAR))
    expected = channels_first(resized[top : top + 24, left : left + 24])
    mapper = ClassificationMapper(is_train=False, resize_test=32, crop_size=24)
    assert torch.equal(mapper(record(tmp_path / "a.png"))["image"], expected)
    bgr = ClassificationMapper(is_train=False, resize_test=32, crop_size=24, image_format="BGR")
    assert torch.equal(bgr(record(tmp_path / "a.png"))["image"], expected[[2, 1, 0]])


@pytest.mark.parametrize("flip, axis", [("horizontal", 2), ("vertical", 1), ("none", None)])
def test_training_flips_half_of_the_images(tmp_path, flip, axis):
    square = Image.fromarray(PIXELS[:, :60])
    square.save(tmp_path / "a.png")
    # Of a whole square no other shape can be cut out.
    mapper = ClassificationMapper(is_train=True, crop_size=32, min_area=1.0, flip=flip)
    expected = channels_first(square.resize((32, 32), Image.Resampling.BILINEAR))
    flipped = expected if axis is None else expected.flip(axis)
    seen = []
    for number in range(40):
        with seeded(number):
            pixels = mapper(record(tmp_path / "a.png"))["image"]
        seen.append(torch.equal(pixels, expected))
        assert seen[-1] or torch.equal(pixels, flipped)
    assert sum(seen) == 40 if axis is None else 10 < sum(seen) < 30


def test_training_cuts_out_parts_of_random_area_shape_and_place(tmp_path):
    side = 200
    ramp = np.zeros((side, side, 3), np.uint8)
    # Pixels that tell where they are from.
    ramp[..., 0], ramp[..., 1] = np.arange(side), np.arange(side)[:, None]
    Image.fromarray(ramp).save(tmp_path / "a.png")
    mapper = ClassificationMapper(is_train=True, crop_size=50, min_area=0.3, flip="none")
    areas, shapes, places = [], [], []
    for number in range(100):
        with seeded(number):
            x, y = mapper(record(tmp_path / "a.png"))["image"][:2].double()
        width, height = (float(z.max() - z.min()) * 50 / 49 for z in (x, y))
        areas.append(width * height / side**2)
        shapes.append(width / height)
        places.append((float(x.mean()), float(y.mean())))
    assert 0.28 < min(areas) < 0.4 and 0.85 < max(areas) <= 1.03
    assert 0.72 < min(shapes) < 0.85 and 1.2 < max(shapes) < 1.38
    assert np.std(places, axis=0).min() > 10


def test_random_numbers_come_from_torch_alone(image):
    mapper = ClassificationMapper(is_train=True, crop_size=32)
    random.seed(0), np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    torch.manual_seed(1)
    first = mapper(image)["image"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(1), np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(mapper(image)["image"], first)
    assert not torch.equal(mapper(image)["image"], first)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_converted_to_colour(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    converted = Image.fromarray(PIXELS).convert(mode)
    converted.save(path)
    expected = channels_first(converted.convert("RGB").crop((15, 0, 75, 60)))
    mapper = ClassificationMapper(is_train=False, resize_test=60, crop_size=60)
    assert torch.equal(mapper(record(path))["image"], expected)


def test_orientation_by_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for name, options in (("plain.jpg", {}), ("turned.jpg", {"exif": exif})):
        Image.fromarray(PIXELS).save(tmp_path / name, **options)
    mapper = ClassificationMapper(is_train=False, resize_test=60, crop_size=50)
    plain, turned = (mapper(record(tmp_path / n))["image"] for n in ("plain.jpg", "turned.jpg"))
    assert torch.equal(plain, turned)


def test_an_image_that_is_too_long_when_scaled_is_refused_before_that(tmp_path):
    Image.fromarray(np.zeros((1, 3000, 3), np.uint8)).save(tmp_path / "a.png")
    options = {"max_pixels": 1_000_000, "crop_size": 32}
    assert ClassificationMapper(is_train=True, **options)(record(tmp_path / "a.png"))
    with pytest.raises(ImageError, match=r"a.png has 3000 x 1 pixels, .* scaled to 64$") as error:
        ClassificationMapper(is_train=False, resize_test=64, **options)(record(tmp_path / "a.png"))
    assert error.value.path == str(tmp_path / "a.png")


def config(**keys):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.CLASSIFICATION.CROP_SIZE, cfg.INPUT.CLASSIFICATION.RESIZE_TEST = 16, 20
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    return cfg


def test_config_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="INPUT.FORMAT must be RGB or BGR .*, got L"):
        build_mapper(config(**{"INPUT.FORMAT": "L"}), is_train=True)
    with pytest.raises(ValueError, match="RESIZE_TEST must be at least CROP_SIZE.* 16, got 15"):
        build_mapper(config(**{"INPUT.CLASSIFICATION.RESIZE_TEST": 15}), is_train=True)
    cfg = config(**{"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"})
    with pytest.raises(ValueError, match="SAMPLER_TRAIN must be TrainingSampler for"):
        build_classification_train_loader(cfg, 0)


@pytest.fixture
def data(tmp_path):
    """Ten training and seven test images of two classes, each of a brightness of its own."""
    for split, count in (("train", 10), ("val", 7)):
        for number in range(count):
            folder = tmp_path / "data" / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = PIXELS // 2 + np.uint8(10 * number)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    names = register_image_folder(tmp_path / "data")
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def assert_equal(ours, others):
    assert len(ours) == len(others)
    for one, other in zip(ours, others, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key])
            else:
                assert value == other[key]


def train_loader(data, seed=5, **keys):
    cfg = config(**{"SOLVER.IMS_PER_BATCH": 4, **keys})
    cfg.DATASETS.TRAIN = data
    return build_classification_train_loader(cfg, seed)


def test_training_batches_are_whole_tensors(data):
    loader = train_loader(data[:1])
    assert loader.num_images == 10
    batches = take(loader, 5)
    for batch in batches:
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["label"].shape == (4,) and batch["label"].dtype == torch.int64
        for name, path, label in zip(
            batch["image_id"], batch["file_name"], batch["label"], strict=True
        ):
            assert path == os.path.join(data[0], name) and name[0] == "ab"[label]
    # Each image twice in two epochs.
    names = sorted(name for batch in batches for name in batch["image_id"])
    assert names == sorted(2 * [record["image_id"] for record in DatasetCatalog.get(data[0])])


def test_workers_change_nothing_and_a_run_goes_on_where_it_stopped(data):
    options = {"SOLVER.ACCUMULATION_STEPS": 2}
    unbroken = take(train_loader(data[:1], **options), 10)
    assert unbroken[0]["image"].shape[0] == 2
    options["DATALOADER.NUM_WORKERS"] = 2
    first = train_loader(data[:1], **options)
    assert_equal(take(first, 6), unbroken[:6])
    second = train_loader(data[:1], seed=99, **options)
    second.load_state_dict(first.state_dict())
    assert_equal(take(second, 4), unbroken[6:])


def test_several_data_sets_are_one(data):
    loader = train_loader(data)
    assert loader.num_images == 17
    paths = [path for batch in take(loader, 17) for path in batch["file_name"]]
    expected = [r["file_name"] for name in data for r in DatasetCatalog.get(name)]
    assert sorted(paths) == sorted(4 * expected)


def test_the_position_is_one_in_the_same_labels(data, tmp_path):
    state = train_loader(data[:1]).state_dict()
    train_loader(data[:1]).load_state_dict(state)
    # The same names in another class.
    os.rename(tmp_path / "data/train/a", tmp_path / "data/train/c")
    os.rename(tmp_path / "data/train/b", tmp_path / "data/train/a")
    os.rename(tmp_path / "data/train/c", tmp_path / "data/train/b")
    with pytest.raises(DatasetError, match="training data are not those"):
        train_loader(data[:1]).load_state_dict(state)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_training_images_are_skipped_up_to_a_fraction(data, num_workers):
    paths = [record["file_name"] for record in DatasetCatalog.get(data[0])]
    truncate(paths[3])
    keys = {"DATALOADER.NUM_WORKERS": num_workers, "DATALOADER.SKIP_UNREADABLE_FRACTION": 0.1}
    loader = train_loader(data[:1], **keys)
    batches = take(loader, 5)
    assert all(paths[3] not in batch["file_name"] for batch in batches)
    assert [len(batch["label"]) for batch in batches] == [4] * 5
    assert loader.state_dict()["unreadable"] == [paths[3]]
    truncate(paths[4])
    with pytest.raises(
        DatasetError, match=r"after the 1 that .*_FRACTION\) 0.1 of 10 images allows"
    ):
        take(train_loader(data[:1], **keys), 5)
    with pytest.raises(ImageError, match=f"({paths[3]}|{paths[4]}) cannot be read"):
        take(train_loader(data[:1], **{"DATALOADER.NUM_WORKERS": num_workers}), 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_testing_gives_each_image_once_and_tells_unreadable_ones(data, num_workers):
    cfg = config(**{"TEST.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": num_workers})
    records = DatasetCatalog.get(data[1])
    mapper = build_mapper(cfg, is_train=False)
    mapped = [mapper(record) for record in records]
    for number in (1, 4, 5):
        truncate(records[number]["file_name"])
    loader = build_classification_test_loader(cfg, data[1])
    assert len(loader) == 4
    batches = list(loader)
    errors = [[error.path for error in batch.pop("unreadable")] for batch in batches]
    paths = [record["file_name"] for record in records]
    assert errors == [[paths[1]], [], [paths[4], paths[5]], []]
    assert batches[2]["image"].shape == (0, 3, 16, 16) and batches[2]["label"].shape == (0,)
    assert batches[2]["image"].dtype == torch.uint8 and batches[2]["label"].dtype == torch.int64
    assert batches[2]["file_name"] == batches[2]["image_id"] == []
    del batches[2]
    expected = [mapped[:1], mapped[2:4], mapped[6:]]
    assert_equal(batches, [collate_classification(part) for part in expected])


def test_processes_share_the_test_images(data, monkeypatch):
    cfg = config(**{"TEST.IMS_PER_BATCH": 3})
    comm = samplers.distributed_sampler.comm
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_classification_test_loader(cfg, data[1])
        batches = list(loader)
        assert len(loader) == len(batches)
        shares.append([name for batch in batches for name in batch["image_id"]])
    assert sorted(map(len, shares)) == [3, 4]
    assert sum(shares, []) == [record["image_id"] for record in DatasetCatalog.get(data[1])]
