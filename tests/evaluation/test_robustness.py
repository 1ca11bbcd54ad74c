"""Changed images against literal loops, attacks against their bounds and a closed form."""

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import Backbone, build_model
from torch import nn

from sasa_det.config.options import RunOptions
from sasa_det.data import register_image_folder, write_digit_crops
from sasa_det.engine import load_config
from sasa_det.engine.tasks import task_of
from sasa_det.errors import DatasetError, ImageError
from sasa_det.evaluation.accuracy import ClassificationEvaluator
from sasa_det.evaluation.robustness import TRANSFORMS, Attack, attack_images, probe_classifier
from sasa_det.modeling import Classifier


class Linear(Backbone):
    """Gives logits that are linear in the pixels."""

    def __init__(self, pixels, classes):
        super().__init__()
        self.layer = nn.Linear(pixels, classes)
        self._out_features, self._out_feature_channels = ["linear"], {"linear": classes}
        self._out_feature_strides = {"linear": None}

    def forward(self, x):
        return {"linear": self.layer(x.flatten(1))}


@pytest.fixture
def linear():
    """A linear classifier of images of 3 x 4 x 5 pixels into two classes."""
    torch.manual_seed(0)
    statistics = {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [50.0, 60.0, 70.0]}
    return Classifier(backbone=Linear(60, 2), num_classes=2, **statistics).eval()


def at_90(image, i, j, height, width):
    """Return the pixel that lies at (i, j) when the image is turned counterclockwise."""
    return image[:, j, width - 1 - i]


PLACES = {
    "untouched": lambda image, i, j, height, width: image[:, i, j],
    "rotated by 90°": at_90,
    "rotated by 180°": lambda image, i, j, height, width: image[:, height - 1 - i, width - 1 - j],
    "rotated by 270°": lambda image, i, j, height, width: image[:, height - 1 - j, i],
    "upside down": lambda image, i, j, height, width: image[:, height - 1 - i, j],
    "mirrored": lambda image, i, j, height, width: image[:, i, width - 1 - j],
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("height,width", [(5, 5), (4, 7), (1, 3)])
def test_transforms_against_loops(name, height, width):
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    changed = TRANSFORMS[name](images)
    turned = name in ("rotated by 90°", "rotated by 270°")
    rows, columns = (width, height) if turned else (height, width)
    assert changed.shape == (2, 3, rows, columns) and changed.dtype == torch.uint8
    for image, result in zip(images, changed, strict=True):
        for i in range(rows):
            for j in range(columns):
                pixel = PLACES[name](image, i, j, height, width)
                assert torch.equal(result[:, i, j], pixel), (i, j)


def test_all_transforms_are_different_and_named_as_their_loops():
    assert list(TRANSFORMS) == list(PLACES)
    image = torch.arange(9).view(1, 1, 3, 3)
    assert len({tuple(change(image).flatten().tolist()) for change in TRANSFORMS.values()}) == 6


@pytest.mark.parametrize("epsilon,step,steps", [(8, 2, 10), (3, 5, 4), (0.5, 0.2, 3), (255, 90, 5)])
def test_attacks_stay_within_their_bounds(linear, epsilon, step, steps):
    images = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    changed = attack_images(linear, images, labels, Attack(epsilon, step, steps))
    assert changed.dtype == torch.float32 and changed.shape == images.shape
    assert not changed.requires_grad
    assert changed.min() >= 0 and changed.max() <= 255
    # Sums round at the height of the pixels.
    assert (changed - images).abs().max() <= epsilon + 2e-5
    assert (changed - images).abs().max() > 0.99 * epsilon


def test_enough_steps_end_in_the_worst_corner(linear):
    """Every pixel ends where a linear classifier's loss is largest: at the bound, 0 or 255."""
    images = torch.randint(0, 256, (8, 3, 4, 5), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 4)
    changed = attack_images(linear, images, labels, Attack(epsilon=20, step=8, steps=6))
    weight = linear.backbone.layer.weight
    for image, label, result in zip(images, labels, changed, strict=True):
        towards_the_other = (weight[1 - label] - weight[label]).sign().view(3, 4, 5)
        worst = (image + 20 * towards_the_other).clamp(0, 255)
        torch.testing.assert_close(result, worst)


def test_an_attack_is_repeatable_and_images_do_not_depend_on_their_batch(linear):
    images = torch.randint(0, 256, (4, 3, 4, 5), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])
    attack = Attack(epsilon=4, step=1, steps=3)
    whole = attack_images(linear, images, labels, attack)
    assert torch.equal(attack_images(linear, images, labels, attack), whole)
    other = attack_images(linear, images, labels, Attack(4, 1, 3, seed=1))
    assert not torch.equal(other, whole)
    # One generator goes on from batch to batch.
    generator = torch.Generator().manual_seed(attack.seed)
    parts = [
        attack_images(linear, images[i : i + 2], labels[i : i + 2], attack, generator)
        for i in (0, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops")
    write_digit_crops(folder / "crops", num_train=20, num_val=30)
    return register_image_folder(folder / "crops")[1]


@pytest.mark.parametrize("backbone", ["build_sasa_resnet_backbone", "build_san_backbone"])
def test_what_a_probe_finds_is_what_the_evaluator_finds(crops, backbone):
    torch.manual_seed(0)
    words = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", backbone, "TEST.IMS_PER_BATCH", "16"]
    cfg = load_config("configs/Quick/classifier_SASA.yaml", words)
    task, model = task_of(RunOptions.read(cfg)), build_model(cfg).eval()
    (first,) = (p for name, p in model.named_parameters() if name.endswith("linear.bias"))
    first.requires_grad_(False)
    loader, attacks = task.test_loader(crops), [Attack(epsilon=16, step=8, steps=2)]
    found = probe_classifier(model, loader, lambda: task.evaluator(crops, ""), attacks)
    evaluated = inference_on_dataset(model, loader, task.evaluator(crops, ""))
    assert found["untouched"] == evaluated["classification"]["top1"]
    assert list(found) == [*TRANSFORMS, "attacked by 16"]
    # The other numbers are those of changed images: each is counted again by hand.
    hits = dict.fromkeys(TRANSFORMS, 0)
    for batch in loader:
        for name, change in TRANSFORMS.items():
            with torch.no_grad():
                best = model.logits(change(batch["image"])).argmax(1)
            hits[name] += int((best == batch["label"]).sum())
    assert {name: found[name] for name in TRANSFORMS} == {
        name: pytest.approx(100 * number / 30) for name, number in hits.items()
    }
    assert found["attacked by 16"] <= found["untouched"]
    # What was trained stays trainable, what was not stays fixed.
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not first.requires_grad


def test_unreadable_images_are_told_once_and_limited(linear, caplog):
    one = {"image": torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "label": torch.tensor([1])}
    none = {"image": one["image"][:0], "label": one["label"][:0]}
    batches = [{**one, "unreadable": []}, {**none, "unreadable": [ImageError("broken", "a.png")]}]
    found = probe_classifier(linear, batches, lambda: ClassificationEvaluator("set", 1))
    assert set(found.values()) <= {0.0, 100.0} and len(found) == len(TRANSFORMS)
    assert caplog.text.count("Left out of the evaluation") == 1
    with pytest.raises(DatasetError, match="1 of 2 images of set cannot be read, and 0 may"):
        probe_classifier(linear, batches, lambda: ClassificationEvaluator("set"))
