"""The lines of docs/backbones.md give detectors that train and detect."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

import sasa_det
from sasa_det.modeling import SASAResNet

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
YAML = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
PYTHON = [text for language, text in BLOCKS if language == "python"]
CONFIGS = re.findall(r"^\| .* \| `(\S+\.yaml)` \|$", PAGE.read_text(), re.MULTILINE)

# So that a step takes a part of a second; SyncBN does not train on CPUs.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 26,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.SASA.WIDTH_MULTIPLIER": 0.25,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
}


def config(base, lines):
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(base))
    cfg.merge_from_other_cfg(CfgNode(lines))
    cfg.merge_from_list([word for pair in SMALL.items() for word in pair])
    return cfg


def assert_trains_and_detects(model):
    assert sum(isinstance(module, SASAResNet) for module in model.modules()) == 1
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, 96, 96, generator=generator)
    objects = Instances((96, 96), gt_boxes=Boxes([[8.0, 8.0, 60.0, 60.0]]))
    objects.gt_classes = torch.tensor([3])
    objects.gt_masks = BitMasks(torch.ones(1, 96, 96, dtype=torch.bool))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with EventStorage():
        loss = sum(model.train()([{"image": image, "instances": objects}] * 2).values())
    loss.backward()
    backbone = dict(model.backbone.bottom_up.named_parameters())
    assert all(weight.grad.isfinite().all() for weight in backbone.values())
    # Attention learns from the losses of the detector.
    assert any(weight.grad.any() for name, weight in backbone.items() if "rel_rows" in name)
    optimizer.step()
    with torch.no_grad():
        [output] = model.eval()([{"image": image}])
    assert output["instances"].image_size == (96, 96)


def test_the_page_has_the_detectors():
    names = {Path(name).name.partition("_R_50")[0] for name in CONFIGS}
    assert names == {"faster_rcnn", "mask_rcnn", "cascade_mask_rcnn"}
    assert len(YAML) == 3 and len(PYTHON) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_rcnns(name):
    torch.manual_seed(0)
    cfg = config(name, YAML[0])
    cfg.MODEL.MASK_ON = "mask" in name and "cascade" not in name
    cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg)
    assert_trains_and_detects(model)
    assert type(model.roi_heads).__name__.startswith("Cascade") == ("cascade" in name)


def test_the_python_of_an_rcnn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = CfgNode(copy.deepcopy(YAML[0]))
    lines.MODEL.DEVICE, lines.MODEL.RESNETS.NORM = "cpu", "BN"
    (tmp_path / "my_backbone.yaml").write_text(lines.dump())
    names = {}
    exec(PYTHON[0], names)
    assert isinstance(names["model"].backbone.bottom_up, SASAResNet)
    assert type(names["model"].roi_heads).__name__ == "StandardROIHeads"


def test_the_python_of_fcos():
    torch.manual_seed(0)
    names = {}
    exec(PYTHON[1], names)
    model = names["cfg"].model
    assert model.backbone.bottom_up.depth == 50
    model.backbone.bottom_up.update(depth=26, norm="BN", width_multiplier=0.25)
    assert model.head.norm == "SyncBN"
    model.head.norm = "BN"
    assert_trains_and_detects(instantiate(model))


def test_the_features_that_fcos_of_adelaidet_reads():
    """Its own code needs compiled operators; it reads these features and builds on their shape."""
    backbone = build_model(config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", YAML[1])).backbone
    shapes = backbone.output_shape()
    assert [shapes[f"p{level}"].stride for level in range(3, 8)] == [8, 16, 32, 64, 128]
    assert {shapes[f"p{level}"].channels for level in range(3, 8)} == {256}
