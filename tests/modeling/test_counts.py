"""Parameters and FLOPs against counts made by hand from the paper's tables."""

import pytest

from sasa_det.engine import load_config
from sasa_det.modeling.complexity import count_config, total
from sasa_det.modeling.paper_tables import PAPER_TABLES
from sasa_det.modeling.report import paper_report, parts_report

# FLOPs in 10^9 and parameters in 10^6; None where no count was made by hand.
COUNTS = {
    "Table 1": [
        (4.68, 13.70), (4.48, 10.34), (4.69, 10.33),
        (6.43, 19.63), (5.73, 14.19), (5.94, 14.18),
        (8.18, 25.56), (6.97, 18.04), (7.18, 18.03),
    ],
    "Table 2": [
        (182.3, 33.40), (172.4, 25.88), (174.2, 25.87), (106.3, 20.03), (108.1, 20.03),
        (108.6, 20.16), (110.3, 20.15),
    ],
    "Table 3": [
        (6.97, 18.04), (7.25, 18.11), (7.43, 18.50), (7.99, 20.85), (8.18, 25.56),
        (7.89, 25.48), (7.71, 25.10), (7.15, 22.75),
    ],
    "Table 4": [(6.51, 18.04), (6.69, 18.04), (6.97, 18.04), (7.33, 18.04), (7.79, 18.04)],
    "Table 6": [(6.14, 16.78), (6.97, 18.04)],
    "Table 7": [(7.10, None), (7.39, None), (7.18, 18.03)],
}  # fmt: skip


@pytest.mark.parametrize("table", COUNTS)
def test_every_row_of_the_paper(table):
    (rows,) = (rows for title, rows in PAPER_TABLES.items() if title.startswith(table))
    assert len(rows) == len(COUNTS[table])
    for row, (flops, parameters) in zip(rows, COUNTS[table], strict=True):
        count = row.count()
        assert count.flops / 1e9 == pytest.approx(flops, abs=0.1), row.name
        if parameters is not None:
            assert count.parameters / 1e6 == pytest.approx(parameters, abs=0.1), row.name


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


def test_report_shows_every_table():
    report = paper_report()
    for table in COUNTS:
        assert f"{table}:" in report
    assert "182.33" in report and "| 33.4 " in report
