"""The predictor beside evaluation, detectron2's DefaultPredictor, and itself in other batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from PIL import ExifTags, Image

from sasa_det.checkpoint import read_checkpoint
from sasa_det.checkpoint.convert import convert_checkpoint
from sasa_det.checkpoint.writing import write_checkpoint
from sasa_det.config.lazy import load_lazy_config
from sasa_det.config.load import load_config
from sasa_det.data.images import read_image
from sasa_det.engine import Predictor, UsageError
from sasa_det.engine.tasks import task_of
from sasa_det.engine.trained_model import load_trained_model
from sasa_det.errors import CheckpointError, ImageError


def images_of(digits, split="train"):
    files = sorted(Path(digits / split).glob("*.png"))
    return [read_image(str(file), 10**6, "BGR") for file in files]


def assert_same(one, other, tolerance=1e-4):
    assert one.image_size == other.image_size and len(one) == len(other)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=0, atol=tolerance
    )
    assert torch.equal(one.pred_classes, other.pred_classes)


def test_it_finds_the_digits(trained, digits):
    predictor = Predictor.from_checkpoint(trained, score_threshold=0.25)
    found = predictor(sorted((digits / "train").glob("*.png")))
    records = DatasetCatalog.get(str(digits / "train.json"))
    hits = objects = 0
    for record, instances in zip(records, found, strict=True):
        assert instances.image_size == (64, 64) and (instances.scores >= 0.25).all()
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            box = instances.pred_boxes.__class__([[x, y, x + width, y + height]])
            near = pairwise_iou(box, instances.pred_boxes)[0] > 0.5
            hits += bool((near & (instances.pred_classes == annotation["category_id"])).any())
            objects += 1
    assert hits > 0.5 * objects
    assert predictor.trained.class_name(3) == "3" and predictor.trained.category_id(3) == 4


def test_a_batch_gives_the_boxes_of_each_image(trained, digits):
    images = images_of(digits)
    # Of all sizes, some of which are the same after resizing or after padding.
    cuts = [(64, 64), (64, 40), (40, 64), (37, 52), (64, 41), (64, 64), (52, 37), (64, 63)]
    images = [image[:height, :width] for image, (height, width) in zip(images, cuts, strict=True)]
    predictor = Predictor.from_checkpoint(trained, score_threshold=0.15, batch_size=3)
    alone = [predictor([image])[0] for image in images]
    assert sum(map(len, alone)) > 20
    for one, other in zip(predictor(images), alone, strict=True):
        assert_same(one, other)
    assert predictor([]) == []


def test_it_prepares_images_as_evaluation_does(trained, digits):
    opts = ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "100"]
    model = load_trained_model(trained, opts=opts)
    predictor = Predictor(model)
    records = DatasetCatalog.get(str(digits / "train.json"))
    loader = task_of(model.options).test_loader(str(digits / "train.json"))
    found = predictor([record["file_name"] for record in records])
    for batch, instances in zip(loader, found, strict=True):
        assert batch[0]["image"].shape == (3, 96, 96)
        with torch.no_grad():
            (expected,) = model.model(batch)
        # Its norms are fused.
        assert_same(instances, expected["instances"], tolerance=1e-3)


def mask_rcnn(tmp_path, **options):
    """The checkpoint of a small Mask R-CNN of detectron2 on our backbone, as it is made."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "26", "MODEL.RESNETS.NORM", "BN"]
    opts += ["MODEL.SASA.WIDTH_MULTIPLIER", "0.25", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    opts += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.2"]
    opts += ["INPUT.MIN_SIZE_TEST", "96", "TEST.DETECTIONS_PER_IMAGE", "20"]
    opts += [str(word) for pair in options.items() for word in pair]
    cfg = load_config("configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml", opts)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    path = tmp_path / "mask_rcnn.pth"
    write_checkpoint({"model": model.state_dict(), "config": cfg.dump()}, path)
    return path, cfg


def test_an_rcnn_predicts_as_detectron2s_own_predictor(tmp_path, digits):
    path, cfg = mask_rcnn(tmp_path)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(path)
    images = [image[:50] for image in images_of(digits)[:3]]
    expected = DefaultPredictor(cfg)
    found = Predictor.from_checkpoint(path)(images)
    for image, instances in zip(images, found, strict=True):
        other = expected(image)["instances"]
        assert len(other) > 5
        assert_same(instances, other, tolerance=2e-3)
        assert (instances.pred_masks == other.pred_masks).float().mean() > 0.999
    # Nothing is known of its three classes: COCO, which its config names, has 80.
    trained = load_trained_model(path)
    assert trained.class_name(2) == "class 2" and trained.category_id(2) == 2


def test_masks_of_tiles(tmp_path, digits):
    path, _ = mask_rcnn(tmp_path)
    image = np.hstack([np.vstack(images_of(digits)[i : i + 2]) for i in (0, 2)])
    (instances,) = Predictor.from_checkpoint(path, tile=80, overlap=0.25)([image])
    assert instances.pred_masks.shape == (len(instances), 128, 128) and len(instances) > 5
    for box, mask in zip(instances.pred_boxes, instances.pred_masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        x0, y0, x1, y1 = box.tolist()
        if len(rows):
            assert x0 - 1 <= columns.min() and columns.max() <= x1 + 1
            assert y0 - 1 <= rows.min() and rows.max() <= y1 + 1


def test_tiles_that_do_not_overlap_are_images(trained, digits):
    images = images_of(digits)[:4]
    whole = np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])
    options = {"score_threshold": 0.3, "tile": 64, "overlap": 0.0}
    (found,) = Predictor.from_checkpoint(trained, **options)([whole])
    parts = [
        # detectron2 cuts boxes off at the border after the suppression, and some then overlap more.
        part[batched_nms(part.pred_boxes.tensor, part.scores, part.pred_classes, 0.5)]
        for part in Predictor.from_checkpoint(trained, score_threshold=0.3)(images)
    ]
    assert found.image_size == (128, 128) and len(found) == sum(map(len, parts)) > 4
    expected = torch.cat(
        [
            part.pred_boxes.tensor + torch.tensor([x, y, x, y])
            for part, (x, y) in zip(parts, ((0, 0), (64, 0), (0, 64), (64, 64)), strict=True)
        ]
    )
    order = torch.cat([part.scores for part in parts]).argsort(descending=True, stable=True)
    torch.testing.assert_close(found.pred_boxes.tensor, expected[order], rtol=0, atol=1e-4)


def test_kinds_of_files_are_read_as_in_training(trained, digits, tmp_path):
    file = sorted((digits / "train").glob("*.png"))[0]
    image = Image.open(file).convert("RGB")
    image = image.crop((0, 0, 64, 48))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "plain.png")
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.save(tmp_path / "image.tif")
    few = image.quantize(200)
    few.save(tmp_path / "palette.png")
    few.convert("RGB").save(tmp_path / "few.png")
    grey = image.convert("L")
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "grey_as_rgb.png")
    inks = image.convert("CMYK")
    inks.save(tmp_path / "inks.tif")
    inks.convert("RGB").save(tmp_path / "inks_as_rgb.png")
    predictor = Predictor.from_checkpoint(trained, score_threshold=0.05)
    for one, *others in (
        ("plain.png", "turned.png", "alpha.png", "image.tif"),
        ("few.png", "palette.png"),
        ("grey_as_rgb.png", "grey.png"),
        ("inks_as_rgb.png", "inks.tif"),
    ):
        expected, *found = predictor([tmp_path / name for name in (one, *others)])
        assert len(expected) and expected.image_size == (48, 64)
        for instances in found:
            assert_same(instances, expected)
    # An array in BGR is what the file says.
    assert_same(predictor([np.array(image)[:, :, ::-1]])[0], predictor([tmp_path / "plain.png"])[0])
    deep = Image.fromarray(np.full((8, 8), 60_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="more than 8 bits"):
        predictor([tmp_path / "deep.png"])


@pytest.mark.parametrize(
    "image, words",
    (
        (np.zeros((4, 4), np.uint8), r"shape \(H, W, 3\) and type uint8 .* got \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "got .* float32"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (torch.zeros(4, 4, 3), "must be a NumPy array or the path of a file, got a Tensor"),
    ),
)
def test_what_is_no_image_is_refused(trained, image, words):
    predictor = Predictor.from_checkpoint(trained)
    with pytest.raises(ValueError, match=words):
        predictor([image])
    with pytest.raises(ValueError, match="must be a list of images, got the path x.png"):
        predictor("x.png")
    with pytest.raises(ValueError, match=r"must be a list of images, got an array of \(4, 4, 3\)"):
        predictor(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "options, words",
    (
        ({"score_threshold": 1.5}, r"score_threshold must be within \[0, 1\], got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tile": -1}, "tile must be at least 1, or 0 for whole images, got -1"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
    ),
)
def test_wrong_options_are_refused(trained, options, words):
    with pytest.raises(ValueError, match=words):
        Predictor.from_checkpoint(trained, **options)


def test_checkpoints_without_what_is_needed(trained, tmp_path):
    content = read_checkpoint(trained)
    bare = tmp_path / "bare.pth"
    write_checkpoint({"model": content["model"]}, bare)
    with pytest.raises(UsageError, match="bare.pth holds no config, .* with --config-file"):
        Predictor.from_checkpoint(bare)
    # With its config, the numbers of its classes; the data are not on this computer.
    config = tmp_path / "config.yaml"
    config.write_text(content["config"].replace("/train.json", "/elsewhere.json"))
    predictor = Predictor.from_checkpoint(bare, config_file=str(config))
    assert predictor.trained.class_name(3) == "class 3"
    with pytest.raises(UsageError, match="no weights are given"):
        Predictor.from_checkpoint("")
    with pytest.raises(CheckpointError, match="nowhere.pth cannot be read"):
        Predictor.from_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        Predictor.from_checkpoint(trained, opts=["MODEL.SASA.WIDTH_MULTIPLIER", "0.5"])
    with pytest.raises(UsageError, match="did you mean MODEL.DEVICE?"):
        Predictor.from_checkpoint(trained, opts=["MODEL.DEVICES", "cpu"])


def test_the_number_of_classes_of_a_config_file_follows_the_checkpoint(trained, tmp_path):
    content = read_checkpoint(trained)
    config = tmp_path / "config.yaml"
    config.write_text(content["config"].replace("NUM_CLASSES: 10", "NUM_CLASSES: 80"))
    model = load_trained_model(trained, config_file=str(config))
    assert model.options.num_classes == 10 and model.model.num_classes == 10


def test_a_published_checkpoint_keeps_names_and_ids(trained, tmp_path):
    """One without the state of training, in either format."""
    shutil.copy(trained, tmp_path / "model.pth")
    for name in ("published.pth", "published.safetensors"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / name, whole=True)
        model = load_trained_model(tmp_path / name)
        assert model.class_names == [str(digit) for digit in range(10)]
        assert model.category_ids == list(range(1, 11))


def test_names_of_coco_without_names_in_the_checkpoint(tmp_path):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SASA.WIDTH_MULTIPLIER", "0.25"]
    opts += ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"]
    cfg = load_config("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml", opts)
    path = tmp_path / "coco.pth"
    # A key of another version is left out.
    text = f"{cfg.dump()}\nKEY_OF_TOMORROW: 3\n"
    write_checkpoint({"model": build_model(cfg).state_dict(), "config": text}, path)
    model = load_trained_model(path)
    assert [model.class_name(index) for index in (0, 79)] == ["person", "toothbrush"]
    assert [model.category_id(index) for index in (0, 79)] == [1, 90]


def lazy_checkpoint(tmp_path, change=lambda text: text):
    words = ["model.backbone.bottom_up.width_multiplier=0.25", "model.backbone.out_channels=32"]
    words += ["model.num_classes=5", "model.test_score_thresh=0.0", "model.head.conv_dims=[32]"]
    words += ["dataloader.test.mapper.augmentations.0.short_edge_length=64"]
    options = load_lazy_config("configs/COCO-Detection/retinanet_SASA_R_50_full.py", words)
    model = instantiate(options.config.model).eval()
    path = tmp_path / "lazy.pth"
    write_checkpoint({"model": model.state_dict(), "config": change(options.dump())}, path)
    return path, model


def test_the_checkpoint_of_a_lazy_config(tmp_path, digits):
    path, model = lazy_checkpoint(tmp_path)
    image = images_of(digits)[0]
    (found,) = Predictor.from_checkpoint(path)([image])
    inputs = {"image": torch.as_tensor(image[:, :, ::-1].transpose(2, 0, 1).copy())}
    with torch.no_grad():
        (expected,) = model([inputs])
    assert len(found) == len(expected["instances"]) > 0
    torch.testing.assert_close(found.scores, expected["instances"].scores, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="config key model.num_clases does not exist; did you"):
        load_trained_model(path, opts=["model.num_clases=3"])


@pytest.mark.parametrize(
    "old, new",
    (
        ("sasa_det.modeling.AttentionRetinaNet,", "os.system,"),
        # By another way to it, and from another part of the config.
        ("sasa_det.modeling.AttentionRetinaNet,", "detectron2.data.detection_utils.np.load,"),
        ("offset: 0.0", "offset: '${dataloader.hidden}'"),
    ),
)
def test_a_hostile_lazy_config_executes_nothing(tmp_path, old, new):
    marker = tmp_path / "executed"

    def change(text):
        values = yaml.safe_load(text)
        values["dataloader"]["hidden"] = {"_target_": "os.system", "command": f"touch {marker}"}
        text = yaml.safe_dump(values, default_flow_style=True, width=10**6)
        assert text.count(old) == 1
        return text.replace(old, new)

    path, _ = lazy_checkpoint(tmp_path, change)
    with pytest.raises(UsageError, match="which a checkpoint may not"):
        load_trained_model(path)
    assert not marker.exists()


def test_classifiers_are_refused(tmp_path):
    cfg = load_config("configs/Quick/classifier_SASA.yaml")
    path = tmp_path / "classifier.pth"
    write_checkpoint({"model": build_model(cfg).state_dict(), "config": cfg.dump()}, path)
    with pytest.raises(UsageError) as error:
        load_trained_model(path)
    assert str(error.value) == (
        f"{path} is a Classifier, which classifies whole images and finds no objects: prediction "
        "needs a detector."
    )
