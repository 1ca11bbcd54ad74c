"""Every detection config trains a step and detects, whatever the images."""

import inspect
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from sasa_det import add_sasa_config
from sasa_det.engine import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/COCO-*/*.yaml"))


SAN = [f"SAN{depth}_{kind}" for depth in (10, 15, 19) for kind in ("pairwise", "patchwise")]


def test_all_rows_of_table_2_a_mask_rcnn_and_detectors_on_san_are_there():
    assert [path.stem for path in CONFIGS] == [
        *(f"faster_rcnn_{name}_FPN" for name in SAN),
        "retinanet_R_50",
        *(f"retinanet_{name}" for name in SAN),
        "retinanet_SASA_R_50_backbone",
        "retinanet_SASA_R_50_convstem_backbone",
        "retinanet_SASA_R_50_convstem_full",
        "retinanet_SASA_R_50_full",
        "mask_rcnn_SASA_R_50_FPN",
    ]


def make_input(height, width, boxes):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    instances.gt_masks = PolygonMasks(
        [[torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()]
         for x0, y0, x1, y1 in boxes]
    )  # fmt: skip
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 2 * height, "width": 2 * width}


# SANs of other depths are their config of depth 10, and modeling/test_san.py builds every depth.
DEEPER = [path for path in CONFIGS if "SAN15" in path.stem or "SAN19" in path.stem]


@pytest.mark.parametrize("config", DEEPER, ids=lambda path: path.stem)
def test_deeper_sans_differ_in_their_depth_alone(config):
    depth = config.stem.partition("SAN")[2][:2]
    cfg = load_config(str(config))
    assert cfg.MODEL.SAN.DEPTH == int(depth)
    assert cfg.OUTPUT_DIR == f"./output/{config.stem}"
    words = ["MODEL.SAN.DEPTH", depth, "OUTPUT_DIR", cfg.OUTPUT_DIR]
    assert cfg == load_config(str(config).replace(f"SAN{depth}", "SAN10"), words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if path not in DEEPER], ids=lambda path: path.stem
)
def test_trains_and_detects(config):
    torch.manual_seed(0)
    # Detectron2's heads of an R-CNN, which are no part of what is tested, are narrow.
    small = "MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32"
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", *small.split()])
    model = build_model(cfg).train()
    # Odd sizes, different in one batch; one image has nothing on it.
    batch = [make_input(97, 131, [[10, 20, 60, 90], [50, 5, 90, 70]]), make_input(75, 64, [])]
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
        for name, loss in losses.items():
            assert torch.isfinite(loss), name
        # Everything that is trained takes part.
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None, name
            if parameter.requires_grad:
                assert torch.isfinite(parameter.grad).all(), name
        empty = model([make_input(65, 33, []), make_input(33, 65, [])])
        assert torch.isfinite(sum(empty.values()))
        assert empty["loss_box_reg"] == 0
    model.eval()
    with torch.no_grad():
        for result, inputs in zip(model(batch), batch, strict=True):
            instances = result["instances"]
            assert instances.image_size == (inputs["height"], inputs["width"])
            assert torch.isfinite(instances.pred_boxes.tensor).all()
            assert len(instances.scores) <= cfg.TEST.DETECTIONS_PER_IMAGE


def test_recipe_of_the_paper():
    cfg = load_config("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml")
    epoch = 117266 / cfg.SOLVER.IMS_PER_BATCH
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (64, 0.12)
    assert cfg.SOLVER.MAX_ITER == round(150 * epoch)
    assert cfg.SOLVER.WARMUP_ITERS == round(epoch) and cfg.SOLVER.WARMUP_FACTOR == 0
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR"
    jitter = cfg.INPUT.JITTER
    assert (jitter.ENABLED, jitter.CROP_SIZE) == (True, 640)
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    sasa = cfg.MODEL.SASA
    assert (sasa.KERNEL_SIZE, sasa.NUM_HEADS, sasa.STEM_HEADS) == (7, 8, 4)


def test_every_key_has_a_comment():
    lines = inspect.getsource(add_sasa_config).splitlines()
    keys = [
        i
        for i, line in enumerate(lines)
        if line.startswith("    ") and " = " in line and "CfgNode()" not in line
    ]
    assert len(keys) > 20
    for i in keys:
        assert lines[i - 1].strip().startswith("#"), lines[i]


def test_yaml_files_carry_no_python():
    texts = {path: path.read_text() for path in Path("configs").rglob("*.yaml")}
    assert len(texts) > 60 and [path for path, text in texts.items() if "!!" in text] == []
