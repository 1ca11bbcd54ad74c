"""The classifier: its two heads, its loss and its probabilities, held against their formulas."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sasa_det import add_sasa_config


def classifier(features, *opts):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "Classifier", "MODEL.DEVICE", "cpu",
            "MODEL.BACKBONE.NAME", "build_sasa_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.RESNETS.DEPTH", 26, "MODEL.RESNETS.NORM", "BN",
            "MODEL.RESNETS.STRIDE_IN_1X1", False,
            "MODEL.RESNETS.OUT_FEATURES", features, "MODEL.SASA.WIDTH_MULTIPLIER", 0.25,
            "MODEL.CLASSIFIER.NUM_CLASSES", 7, *opts,
        ]
    )  # fmt: skip
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.tensor([6, 0, 3])}


def test_loss_is_cross_entropy_with_smoothed_labels(batch):
    model = classifier(["linear"], "MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.1).double()
    loss = model(batch)["loss_cls"]
    log_p = model.logits(batch["image"]).log_softmax(dim=1)
    target = torch.full((3, 7), 0.1 / 7, dtype=torch.double)
    target[range(3), batch["label"]] += 0.9
    torch.testing.assert_close(loss, -(target * log_p).sum() / 3)


@pytest.mark.parametrize("features", [["linear"], ["res5"], ["res3", "res4"], ["res4", "linear"]])
def test_heads_give_the_logits_of_the_averaged_feature(features, batch):
    if "res4" in features and "linear" in features:
        features = ["res5", *features]
    model = classifier(features).eval()
    linear = model.linear if model.linear is not None else model.backbone.linear
    assert (model.linear is None) == ("linear" in features)
    coarsest = "res4" if features == ["res3", "res4"] else "res5"
    probe = classifier([coarsest]).eval()
    probe.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "linear" not in k}, strict=False
    )
    normalized = (batch["image"] - model.pixel_mean) / model.pixel_std
    feature = probe.backbone(normalized)[coarsest]
    expected = feature.mean(dim=(2, 3)) @ linear.weight.T + linear.bias
    torch.testing.assert_close(model.logits(batch["image"]), expected, rtol=1e-4, atol=1e-5)
    scores = torch.stack([output["scores"] for output in model(batch)])
    torch.testing.assert_close(scores, expected.softmax(dim=1), rtol=1e-4, atol=1e-6)


def test_a_list_of_images_is_the_same_as_a_batch(batch):
    model = classifier(["linear"])
    samples = [
        {"image": image, "label": int(label)}
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]
    assert model(samples)["loss_cls"].item() == pytest.approx(model(batch)["loss_cls"].item())
    model.eval()
    for one, other in zip(model(samples), model(batch), strict=True):
        assert torch.equal(one["scores"], other["scores"])
    assert model({"image": batch["image"][:0], "label": batch["label"][:0]}) == []


def test_other_number_of_classes_is_refused():
    from sasa_det.modeling import Classifier, SASAResNet

    backbone = SASAResNet(depth=26, width_multiplier=0.25, num_classes=5, out_features=["linear"])
    with pytest.raises(ValueError, match="NUM_CLASSES.* 7 classes, it has 5"):
        Classifier(backbone=backbone, num_classes=7, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
