"""Test-time augmentation of RetinaNet."""

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import pairwise_iou

from sasa_det.config.load import load_config
from sasa_det.modeling import RetinaNetWithTTA, fuse, with_augmentation
from sasa_det.modeling.test_time_augmentation import check_augmentation

SIZE = 64


def config(*opts, file="configs/Quick/retinanet_SASA.yaml"):
    words = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MAX_SIZE", "200"]
    words += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "50"]
    return load_config(file, [*words, *opts])


@pytest.fixture(scope="module")
def model():
    """A detector that has learnt nothing, whose scores differ."""
    torch.manual_seed(0)
    model = build_model(config()).eval()
    torch.nn.init.normal_(model.head.cls_score[-1].weight, std=0.3)
    torch.nn.init.normal_(model.head.bbox_pred[-1].weight, std=0.3)
    return model


def sample(height=48, width=SIZE, seed=0):
    pixels = torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return {"image": pixels, "height": height, "width": width}


def suppress(boxes, scores, classes, threshold):
    """Non-maximum suppression in each class, as a loop."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        rivals = [k for k in kept if classes[k] == classes[index]]
        x0, y0, x1, y1 = boxes[index]
        for k in rivals:
            a0, b0, a1, b1 = boxes[k]
            shared = max(min(x1, a1) - max(x0, a0), 0) * max(min(y1, b1) - max(y0, b0), 0)
            union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared
            if shared > threshold * union:
                break
        else:
            kept.append(index)
    return kept


@pytest.mark.parametrize("flip", (True, False))
@torch.no_grad()
def test_it_is_the_union_of_the_images_without_duplicates(model, flip):
    cfg = config("TEST.AUG.MIN_SIZES", "(48, 72)", "TEST.AUG.FLIP", str(flip))
    inputs = sample()
    boxes, scores, classes = [], [], []
    pixels = inputs["image"].permute(1, 2, 0).numpy()
    for side in (48, 72):
        resized = ResizeShortestEdge(side, 200).get_transform(pixels).apply_image(pixels)
        for mirrored in (False, True)[: 1 + flip]:
            image = resized[:, ::-1] if mirrored else resized
            tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
            found = model([{"image": tensor}])[0]["instances"]
            for x0, y0, x1, y1 in found.pred_boxes.tensor.tolist():
                if mirrored:
                    x0, x1 = image.shape[1] - x1, image.shape[1] - x0
                scale = image.shape[1] / 64, image.shape[0] / 48
                boxes.append((x0 / scale[0], y0 / scale[1], x1 / scale[0], y1 / scale[1]))
            scores += found.scores.tolist()
            classes += found.pred_classes.tolist()
    kept = suppress(boxes, scores, classes, 0.5)[:50]
    (found,) = RetinaNetWithTTA(cfg, model)([inputs])
    found = found["instances"]
    assert found.image_size == (48, 64) and len(kept) == len(found) == 50
    torch.testing.assert_close(found.scores, torch.tensor([scores[k] for k in kept]))
    assert found.pred_classes.tolist() == [classes[k] for k in kept]
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([boxes[k] for k in kept]), rtol=0, atol=1e-3
    )


@torch.no_grad()
def test_flips_make_it_the_same_in_a_mirror(model):
    """The model alone sees other objects in the mirrored image."""
    augmented = RetinaNetWithTTA(config("TEST.AUG.MIN_SIZES", "(64,)"), fuse(model))
    inputs = sample()
    mirror = {**inputs, "image": inputs["image"].flip(2)}

    def differences(detector):
        plain, mirrored = (output["instances"] for output in detector([inputs, mirror]))
        corners = mirrored.pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        mirrored.pred_boxes.tensor = corners + torch.tensor([SIZE, 0, SIZE, 0])
        same = plain.pred_classes[:, None] == mirrored.pred_classes
        best = (pairwise_iou(plain.pred_boxes, mirrored.pred_boxes) * same).max(dim=1).values
        return (best < 0.99).sum().item()

    # At the end of the 50 boxes, equal scores may come in another order.
    assert differences(augmented) <= 2 and differences(model) > 20


def test_rcnns_have_detectron2s_own():
    words = ["MODEL.DEVICE", "cpu", "MODEL.SASA.WIDTH_MULTIPLIER", "0.25"]
    file = "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml"
    cfg = config(*words, "MODEL.RESNETS.DEPTH", "26", file=file)
    model = build_model(cfg).eval()
    augmented = with_augmentation(cfg, model)
    assert isinstance(augmented, GeneralizedRCNNWithTTA) and not augmented.training


def test_models_without_it_are_refused():
    cfg = config("MODEL.META_ARCHITECTURE", "PanopticFPN")
    with pytest.raises(ValueError) as error:
        check_augmentation(cfg)
    assert str(error.value) == (
        "TEST.AUG.ENABLED must be False for MODEL.META_ARCHITECTURE PanopticFPN: test-time "
        "augmentation exists for RetinaNet, AttentionRetinaNet, GeneralizedRCNN."
    )
    cfg = config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.KEYPOINT_ON", "True")
    with pytest.raises(ValueError, match="must be False with MODEL.KEYPOINT_ON True"):
        check_augmentation(cfg)
    check_augmentation(config("TEST.AUG.ENABLED", "False"))
