import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image

from sasa_det.config import add_sasa_config
from sasa_det.data import (
    ClassificationMapper,
    DatasetError,
    build_test_mapper,
    build_train_mapper,
    jitter_and_crop_augmentations,
)


def config(scale=(1.0, 1.0), crop=40, flip="none"):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.JITTER.ENABLED = True
    cfg.INPUT.JITTER.MIN_SCALE, cfg.INPUT.JITTER.MAX_SCALE = scale
    cfg.INPUT.JITTER.CROP_SIZE = crop
    cfg.INPUT.RANDOM_FLIP = flip
    return cfg


def dataset_dict(path, pixels, boxes=()):
    """Writes an image and describes it; boxes are X, Y, width, height, classes count from 0."""
    Image.fromarray(pixels).save(path)
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": i, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    height, width = pixels.shape[:2]
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_image_that_fits_is_padded_and_its_boxes_scaled(tmp_path):
    # 20 x 10 fits into 40 x 40 twice: it becomes 40 wide and 20 high, and 20 rows are padded.
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), [(1, 2, 5, 4), (15, 5, 5, 5)])
    mapped = build_train_mapper(config())(sample)
    assert mapped["image"].shape == (3, 40, 40) and mapped["image"].dtype == torch.uint8
    assert (mapped["image"][:, 20:] == 128).all()
    assert not (mapped["image"][:, :20] == 128).all(dim=0).any(dim=1).all()
    instances = mapped["instances"]
    assert instances.image_size == (40, 40)
    assert instances.gt_boxes.tensor.tolist() == [[2, 4, 12, 12], [30, 10, 40, 20]]
    assert instances.gt_classes.tolist() == [0, 1]


def test_integer_boxes_keep_their_fractions(tmp_path):
    sample = dataset_dict(tmp_path / "a.png", noise(100, 100), [(10, 10, 5, 5)])
    instances = build_train_mapper(config(crop=133))(sample)["instances"]
    expected = torch.tensor([[13.3, 13.3, 19.95, 19.95]])
    assert torch.allclose(instances.gt_boxes.tensor, expected)
    assert sample["annotations"][0]["bbox"] == [10, 10, 5, 5]


def test_crop_clips_boxes_and_drops_those_outside(tmp_path, monkeypatch):
    # 20 x 10 fits four times into 80 x 80: 80 wide, 40 high. The crop takes 40 of the 80 columns;
    # half of the room, 20, is left off at the left.
    monkeypatch.setattr(np.random, "uniform", lambda low=0.0, high=1.0, size=None: (low + high) / 2)
    boxes = [(6, 1, 3, 2), (3, 2, 4, 3), (13, 0, 7, 10), (0, 0, 5, 10), (15, 0, 5, 5)]
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), boxes)
    instances = build_train_mapper(config(scale=(2.0, 2.0)))(sample)["instances"]
    # times 4, minus 20 in x: 4..16; -8..8 is clipped at 0; 32..60 at 40. The fourth ends at 0 and
    # the fifth begins at 40: both are gone.
    assert instances.gt_boxes.tensor.tolist() == [[4, 4, 16, 12], [0, 8, 8, 20], [32, 0, 40, 40]]
    assert instances.gt_classes.tolist() == [0, 1, 2]


@pytest.mark.parametrize("least, kept", [(0.5, [0, 1, 2]), (0.51, [0, 2]), (0.9, [0]), (1.0, [0])])
def test_objects_of_which_little_is_in_the_crop_can_be_left_out(tmp_path, monkeypatch, least, kept):
    # The crop of the test above, which has all, 8/16 and 28/32 of these boxes.
    monkeypatch.setattr(np.random, "uniform", lambda low=0.0, high=1.0, size=None: (low + high) / 2)
    boxes = [(6, 1, 3, 2), (3, 2, 4, 3), (8, 0, 8, 10)]
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), boxes)
    cfg = config(scale=(2.0, 2.0))
    cfg.INPUT.JITTER.MIN_VISIBLE = least
    instances = build_train_mapper(cfg)(sample)["instances"]
    assert instances.gt_classes.tolist() == kept


def test_a_crop_of_which_all_objects_are_left_out_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(np.random, "uniform", lambda low=0.0, high=1.0, size=None: (low + high) / 2)
    cfg = config(scale=(2.0, 2.0))
    cfg.INPUT.JITTER.MIN_VISIBLE = 0.6
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), [(3, 2, 4, 3)])
    assert len(build_train_mapper(cfg)(sample)["instances"]) == 0


@pytest.mark.parametrize("jitter", [True, False])
def test_boxes_end_at_the_border_of_the_image(tmp_path, jitter):
    # 20 x 10 becomes 40 x 20; below it the crop is padding, where no box may reach.
    boxes = [(-2, -3, 6, 6), (15, 5, 9, 30), (0, 11, 20, 5), (2, 2, 0, 4), (25, 1, 3, 3)]
    cfg = config()
    cfg.INPUT.JITTER.ENABLED, cfg.INPUT.MIN_SIZE_TRAIN = jitter, (20,)
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), boxes)
    before = copy.deepcopy(sample)
    instances = build_train_mapper(cfg)(sample)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 8, 6], [30, 10, 40, 20]]
    assert instances.gt_classes.tolist() == [0, 1]
    assert sample == before


def test_fault_of_an_annotation_is_not_blamed_on_the_image(tmp_path):
    cfg = config()
    cfg.MODEL.MASK_ON = True
    sample = dataset_dict(tmp_path / "a.png", noise(10, 20), [(1, 2, 5, 4)])
    sample["annotations"][0]["segmentation"] = "no mask"
    with pytest.raises(ValueError, match="Cannot transform segmentation") as error:
        build_train_mapper(cfg)(sample)
    assert not isinstance(error.value, DatasetError)


def test_boxes_follow_the_pixels(tmp_path):
    # A white block on black: wherever it ends up, its box is where the white is.
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[8:20, 14:34] = 255
    sample = dataset_dict(tmp_path / "a.png", pixels, [(14, 8, 20, 12)])
    mapper = build_train_mapper(config(scale=(0.6, 2.0), crop=64, flip="horizontal"))
    np.random.seed(0)
    clipped = flipped = 0
    for _ in range(40):
        mapped = mapper(sample)
        assert mapped["image"].shape == (3, 64, 64)
        # Padding is 128 and grey of the edges is near it at most on a line: white is above 191.
        white = (mapped["image"] > 191).all(dim=0)
        rows, columns = torch.nonzero(white.any(dim=1)), torch.nonzero(white.any(dim=0))
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = mapped["instances"].gt_boxes.tensor[0]
        assert torch.allclose(torch.stack(found).float(), box, atol=1.5)
        clipped += int(box.min() == 0 or box.max() == 64)
        flipped += int((mapped["image"][:, 0, 0] == 128).all())
    assert clipped > 0 and flipped > 0


def test_scale_stays_within_its_bounds(tmp_path):
    image = noise(20, 30)
    resize = jitter_and_crop_augmentations(config(scale=(0.8, 1.2), crop=60), True)[0]
    np.random.seed(0)
    widths = []
    for _ in range(200):
        height, width = resize.get_transform(image).apply_image(image).shape[:2]
        assert abs(height - width * 2 / 3) <= 1
        widths.append(width)
    # The longer side fits into 60 times the factor.
    assert min(widths) >= 48 and max(widths) <= 72
    assert min(widths) <= 50 and max(widths) >= 70


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (100, 3), (33, 47)])
def test_output_is_always_the_crop(tmp_path, shape):
    mapper = build_train_mapper(config(scale=(0.8, 1.2), crop=32))
    sample = dataset_dict(tmp_path / "a.png", noise(*shape), [(0, 0, shape[1], shape[0])])
    for _ in range(5):
        assert mapper(sample)["image"].shape == (3, 32, 32)


def test_grey_and_transparent_images_have_three_channels(tmp_path):
    grey = np.full((8, 8), 77, np.uint8)
    mapped = build_train_mapper(config(crop=8))(dataset_dict(tmp_path / "grey.png", grey))
    assert (mapped["image"] == 77).all() and mapped["image"].shape == (3, 8, 8)
    colour = np.full((8, 8, 4), (10, 20, 30, 40), np.uint8)
    mapped = build_train_mapper(config(crop=8))(dataset_dict(tmp_path / "rgba.png", colour))
    # detectron2's default format is BGR.
    assert mapped["image"][:, 0, 0].tolist() == [30, 20, 10]


def test_colors_change_within_their_limits(tmp_path):
    grey = dataset_dict(tmp_path / "grey.png", np.full((8, 8), 100, np.uint8))
    color = dataset_dict(tmp_path / "color.png", np.full((8, 8, 3), (200, 100, 50), np.uint8))
    cfg = config(crop=8)
    cfg.INPUT.JITTER.COLOR = 0.2
    mapper = build_train_mapper(cfg)
    # Of one grey, contrast and saturation change nothing.
    np.random.seed(0)
    levels = [mapper(grey)["image"] for _ in range(200)]
    assert all((level == level[0, 0, 0]).all() for level in levels)
    levels = [level[0, 0, 0].item() for level in levels]
    assert 77 <= min(levels) < 85 and 115 < max(levels) <= 120  # each step rounds down
    ratios = [
        (image[0, 0, 0] / image[1, 0, 0]).item()
        for image in (mapper(color)["image"] for _ in range(200))
    ]
    assert min(ratios) < 0.49 and max(ratios) > 0.51  # saturation


@pytest.mark.parametrize("flip, both", [("none", 1), ("horizontal", 2), ("vertical", 2)])
def test_flip_follows_the_config(tmp_path, flip, both):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0] = 255
    corner = {"horizontal": (0, 7), "vertical": (7, 0)}.get(flip, (0, 0))
    mapper = build_train_mapper(config(crop=8, flip=flip))
    np.random.seed(0)
    sample = dataset_dict(tmp_path / "a.png", pixels)
    seen = {tuple(torch.nonzero(mapper(sample)["image"][0])[0].tolist()) for _ in range(30)}
    assert seen == {(0, 0), corner} and len(seen) == both


def thin_config(jitter, crop_type=""):
    cfg = config(crop=640)
    cfg.INPUT.JITTER.ENABLED, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST = jitter, 640, 640
    if crop_type:
        cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, crop_type, [0.3, 1]
    return cfg


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("length, size", [(300, (2, 640)), (1500, (1, 640)), (9000, (1, 640))])
def test_long_thin_images_keep_a_pixel_of_their_shorter_side(tmp_path, length, size, upright):
    # The longer side becomes 640; half of the image is the object.
    size, shape, box = size, (1, length), (0, 0, length // 2, 1)
    expected = [0, 0, 320, size[0]]
    if upright:
        size, shape, box = size[::-1], shape[::-1], (0, 0, 1, length // 2)
        expected = [0, 0, size[1], 320]
    sample = dataset_dict(tmp_path / "a.png", noise(*shape), [box])
    mapped = build_train_mapper(thin_config(jitter=False))(sample)
    assert mapped["image"].shape == (3, *size)
    assert mapped["instances"].gt_boxes.tensor.tolist() == [expected]
    assert build_test_mapper(thin_config(jitter=False))(sample)["image"].shape == (3, *size)
    mapped = build_train_mapper(thin_config(jitter=True))(sample)
    assert mapped["image"].shape == (3, 640, 640)
    assert mapped["instances"].gt_boxes.tensor.tolist() == [expected]
    padding = mapped["image"][:, size[0] :, size[1] :]
    assert (padding == 128).all() and not (mapped["image"][:, : size[0], : size[1]] == 128).all()
    for is_train in (True, False):
        mapper = ClassificationMapper(is_train=is_train, crop_size=32, resize_test=32)
        record = {**sample, "label": 0}
        assert mapper(record)["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("shape", [(1, 300), (1, 1), (2, 1)])
def test_crops_of_long_thin_images_keep_a_pixel(tmp_path, shape):
    sample = dataset_dict(tmp_path / "a.png", noise(*shape), [(0, 0, *shape[::-1])])
    mapper = build_train_mapper(thin_config(jitter=False, crop_type="relative"))
    np.random.seed(0)
    for _ in range(10):
        mapped = mapper(sample)
        assert len(mapped["instances"]) == 1 and min(mapped["image"].shape) >= 1


def mask_and_keypoint_config(jitter, mask_format):
    cfg = config(crop=40)
    cfg.INPUT.JITTER.ENABLED, cfg.INPUT.MASK_FORMAT = jitter, mask_format
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.DATASETS.TRAIN = ("keypoints_of_test_mapper",)
    MetadataCatalog.get("keypoints_of_test_mapper").set(
        keypoint_names=["left", "right"], keypoint_flip_map=[("left", "right")]
    )
    return cfg


@pytest.fixture
def keypoint_names(unregister):
    unregister.append("keypoints_of_test_mapper")


@pytest.mark.parametrize("objects", ["none", "crowds", "all cropped away", "one"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("jitter", [False, True])
def test_images_have_masks_and_keypoints_with_any_number_of_objects(
    tmp_path, keypoint_names, monkeypatch, jitter, mask_format, objects
):
    # With jitter the crop begins at half of the width, where the object, 1..5 of 20, has ended.
    monkeypatch.setattr(np.random, "uniform", lambda low=0.0, high=1.0, size=None: high)
    cfg = mask_and_keypoint_config(jitter, mask_format)
    if objects == "all cropped away":
        cfg.INPUT.JITTER.MIN_SCALE = cfg.INPUT.JITTER.MAX_SCALE = 2.0
    sample = dataset_dict(
        tmp_path / "a.png", noise(10, 20), [] if objects == "none" else [(1, 2, 4, 4)]
    )
    for annotation in sample["annotations"]:
        annotation["segmentation"] = [[1, 2, 5, 2, 5, 6, 1, 6]]
        annotation["keypoints"] = [2, 3, 2, 4, 5, 1]
        annotation["iscrowd"] = int(objects == "crowds")
    mapped = build_train_mapper(cfg)(sample)
    instances = mapped["instances"]
    number = int(objects == "one" or (objects == "all cropped away" and not jitter))
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_masks", "gt_keypoints"}
    assert len(instances) == number and "annotations" not in mapped
    masks = instances.gt_masks
    assert type(masks) is {"polygon": PolygonMasks, "bitmask": BitMasks}[mask_format]
    if mask_format == "bitmask":
        assert masks.tensor.shape == (number, *mapped["image"].shape[1:])
    assert instances.gt_keypoints.tensor.shape == (number, 2, 3)


def test_inference_resizes_as_detectron2_does():
    cfg = config()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 50, 80
    (resize,) = jitter_and_crop_augmentations(cfg, is_train=False)
    assert isinstance(resize, T.ResizeShortestEdge)
    image = noise(20, 30)
    assert resize.get_transform(image).apply_image(image).shape == (50, 75, 3)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("INPUT.JITTER.MIN_SCALE", 0.0, r"INPUT\.JITTER\.MIN_SCALE .* got 0\.0 and 1\.2"),
        ("INPUT.JITTER.MIN_SCALE", 1.5, r"0 < MIN_SCALE <= MAX_SCALE, got 1\.5 and 1\.2"),
        ("INPUT.JITTER.CROP_SIZE", 0, r"INPUT\.JITTER\.CROP_SIZE must be >= 1, got 0"),
        ("INPUT.JITTER.MIN_VISIBLE", 1.5, r"INPUT\.JITTER\.MIN_VISIBLE must be in .* got 1\.5"),
        ("INPUT.JITTER.COLOR", 1.0, r"INPUT\.JITTER\.COLOR must be in \[0, 1\), got 1\.0"),
        ("INPUT.RANDOM_FLIP", "sideways", r"INPUT\.RANDOM_FLIP must be .* got 'sideways'"),
        ("INPUT.CROP.ENABLED", True, r"INPUT\.CROP\.ENABLED must be False with INPUT\.JITTER"),
    ],
)
def test_bad_config_values_are_named(key, value, message):
    cfg = config(scale=(0.8, 1.2))
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_train_mapper(cfg)
