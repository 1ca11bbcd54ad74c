"""Parameters and FLOPs of detectors against counts made by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from sasa_det.analysis import paper
from sasa_det.analysis.complexity import count_config, parts_report, total
from sasa_det.analysis.paper import count_row
from sasa_det.analysis.paper_tables import PAPER_TABLES
from sasa_det.engine import load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# FLOPs in 10^9 and parameters in 10^6 of the rows of Table 2.
RETINANETS = [
    (182.3, 33.40), (172.4, 25.88), (174.2, 25.87), (106.3, 20.03), (108.1, 20.03),
    (108.6, 20.16), (110.3, 20.15),
]  # fmt: skip


def test_every_row_of_table_2():
    table = PAPER_TABLES["Table 2"]
    for row, (flops, parameters) in zip(table.rows, RETINANETS, strict=True):
        count = count_row(CONFIGS, table, row)
        assert count.flops / 1e9 == pytest.approx(flops, abs=0.05), row.name
        assert count.parameters / 1e6 == pytest.approx(parameters, abs=0.01), row.name


@pytest.mark.parametrize(
    "name,mixing_layer,flops,parameters",
    [
        ("retinanet_R_50", False, 189.9, 33.84),
        ("retinanet_SASA_R_50_convstem_backbone", False, 180.0, 26.32),
        ("retinanet_SASA_R_50_backbone", False, 181.7, 26.31),
        ("retinanet_SASA_R_50_convstem_full", True, 109.4, 20.21),
        ("retinanet_SASA_R_50_full", True, 111.2, 20.20),
    ],
)
def test_configs_with_9_anchors_and_80_classes(name, mixing_layer, flops, parameters):
    cfg = load_config(
        f"configs/COCO-Detection/{name}.yaml", ["MODEL.SASA.HEAD_MIXING_LAYER", str(mixing_layer)]
    )
    count = total(count_config(cfg, 640, 640))
    assert count.flops / 1e9 == pytest.approx(flops, abs=0.1)
    assert count.parameters / 1e6 == pytest.approx(parameters, abs=0.1)


def test_parts_of_a_retinanet():
    cfg = load_config("configs/COCO-Detection/retinanet_SASA_R_50_full.yaml")
    parts = {part.name: part for part in count_config(cfg, 640, 640)}
    assert list(parts) == ["stem", "res2", "res3", "res4", "res5", "FPN", "head"]
    pixels = 160 * 160 // 4**2
    # Two 1x1 projections of three and one attention layer of 49 neighbours for res5's last block.
    block = 2 * (2048 * 512 * 2 + 3 * 512 * 512 + 3 * 49 * 512) * 400
    first = 2 * (1024 * 512 + 3 * 512 * 512 + 3 * 49 * 512) * pixels
    first += 2 * (512 * 2048 + 1024 * 2048) * 400
    assert parts["res5"].flops == first + 2 * block
    # Embeddings of 7 row and 7 column offsets for half of 64 channels in each of 8 heads.
    embeddings = 2 * 7 * 32 * 8
    norms = 2 * (512 + 512 + 2048)
    block = 2048 * 512 * 2 + 3 * 512 * 512 + embeddings + norms
    first = 1024 * 512 + 512 * 2048 + 3 * 512 * 512 + embeddings + norms + 1024 * 2048 + 2 * 2048
    assert parts["res5"].parameters == first + 2 * block


def test_an_rcnn_reports_what_it_does_not_count():
    cfg = load_config("configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml")
    parts = count_config(cfg, 64, 64)
    assert parts[-1].name == "head" and parts[-1].flops is None
    assert total(parts).flops is None
    assert "not counted" in parts_report(parts, 64, 64)


@pytest.mark.parametrize("features", [["linear"], ["res4", "res5"]])
def test_a_classifier_of_its_own_or_the_backbones(features):
    cfg = load_config(
        "configs/Ablations/table1_R26_full.yaml",
        ["MODEL.RESNETS.OUT_FEATURES", str(features), "MODEL.CLASSIFIER.NUM_CLASSES", "10"],
    )
    parts = count_config(cfg, 64, 96)
    assert [part.name for part in parts] == ["stem", "res2", "res3", "res4", "res5", "linear"]
    assert parts[-1].parameters == 2048 * 10 + 10
    assert parts[-1].flops == 2 * 2048 * 10


class Odd(Backbone):
    """Holds parameters of its own and works beside its children."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.unused, self.layers = nn.Linear(3, 4), nn.ModuleList([nn.Conv2d(3, 6, 1)])
        self._out_features = ["out"]
        self._out_feature_channels, self._out_feature_strides = {"out": 6}, {"out": 1}

    def forward(self, x):
        mixed = x.flatten(2) @ x.flatten(2).mT
        return {"out": self.layers[0](x) + mixed.sum() * self.scale.sum()}


def test_nothing_of_a_backbone_is_lost():
    BACKBONE_REGISTRY._obj_map["odd"] = lambda cfg, shape: Odd()
    try:
        cfg = load_config("configs/Ablations/Base-Ablation.yaml", ["MODEL.BACKBONE.NAME", "odd"])
        parts = {part.name: part for part in count_config(cfg, 10, 20)}
    finally:
        del BACKBONE_REGISTRY._obj_map["odd"]
    assert (parts["unused"].parameters, parts["unused"].flops) == (16, 0)
    assert parts["layers"].parameters == 24
    assert parts["other"].parameters == 5
    product, convolution = 2 * 3 * 200 * 3, 2 * 200 * 3 * 6
    flops = [part.flops for name, part in parts.items() if name != "linear"]
    assert sum(flops) == product + convolution


@pytest.mark.parametrize("name", ["SAN10_pairwise", "SAN10_patchwise"])
def test_a_san(name):
    parts = count_config(load_config(f"configs/ImageNet/{name}.yaml"), 224, 224)
    assert [part.name for part in parts] == ["stem", "res2", "res3", "res4", "res5", "linear"]
    exact = {"SAN10_pairwise": 10_531_848, "SAN10_patchwise": 11_841_124}
    assert total(parts).parameters == exact[name]


def test_report_shows_every_table(monkeypatch):
    last = {name: replace(table, rows=table.rows[-1:]) for name, table in PAPER_TABLES.items()}
    monkeypatch.setattr(paper, "PAPER_TABLES", last)
    report = paper.paper_report(CONFIGS)
    for name, table in PAPER_TABLES.items():
        assert f"{name}: {table.title}\n" in report
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert ["ResNet-50 full attention", "7.2", "7.18", "18.0", "18.03", "77.6"] in cells
    assert ["width 1.5 full attention", "", "15.39", "", "38.97", ""] in cells
