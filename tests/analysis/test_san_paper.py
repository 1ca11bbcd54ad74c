"""The table of SAN's paper against sums written out here."""

from pathlib import Path

import pytest

from sasa_det.analysis.san_paper import SAN_TABLE, count_san_row, san_paper_report

CONFIGS = Path(__file__).parents[2] / "configs"

EXACT_PARAMETERS = {
    "SAN10, pairwise": 10_531_848,
    "SAN10, patchwise": 11_841_124,
    "SAN15, pairwise": 14_065_436,
    "SAN15, patchwise": 16_181_310,
    "SAN19, pairwise": 17_596_156,
    "SAN19, patchwise": 20_518_470,
}


@pytest.fixture(scope="module")
def counts():
    return {row.name: count_san_row(CONFIGS, row) for row in SAN_TABLE.rows}


@pytest.mark.parametrize("row", SAN_TABLE.rows, ids=lambda row: row.name)
def test_every_printed_digit(counts, row):
    count = counts[row.name]
    assert round(count.flops / 1e9, 1) == row.flops
    assert round(count.parameters / 1e6, 1) == row.parameters
    # 2.2 and 1.9 have two digits: the count is 2.0 and 1.8% below them.
    assert count.flops / 1e9 == pytest.approx(row.flops, rel=0.0205)


def operations(pairwise, blocks):
    """Add up the operations of a SAN at 224 x 224, layer by layer."""
    side, width = 224, 64
    pixels = side**2

    def normed(values):
        return 2 * values + values  # batch norm and ReLU

    count = 3 * 64 * pixels + normed(64 * pixels)
    for number, channels in zip(blocks, (64, 256, 512, 1024, 2048), strict=True):
        count += width * side**2  # max pool
        side //= 2
        pixels = side**2
        window = 9 if channels == 64 else 49
        relation, values = channels // 16, channels // 4
        groups = values // 8
        count += width * channels * pixels + normed(channels * pixels)
        block = normed(channels) + normed(values)
        block += 2 * (channels * relation + relation) + channels * values + values
        if pairwise:
            block += window * (
                relation + 2  # differences
                + normed(relation + 2) + (relation + 2) * relation
                + normed(relation) + relation * groups + groups
            )  # fmt: skip
            block += 2 * 2 + 2  # the linear layer of positions
        else:
            inputs = relation * (window + 1)
            block += normed(inputs) + inputs * groups
            block += normed(groups) + (groups + 1) * groups * window
        block += window * values
        block += values * channels + channels
        count += number * block * pixels
        width = channels
    return count + width * pixels + width * 1000


@pytest.mark.parametrize("pairwise", [True, False])
@pytest.mark.parametrize(
    "depth,blocks", [(10, (2, 1, 2, 4, 1)), (15, (3, 2, 3, 5, 2)), (19, (3, 3, 4, 6, 3))]
)
def test_operations_and_parameters_are_exact(counts, depth, blocks, pairwise):
    name = f"SAN{depth}, {'pairwise' if pairwise else 'patchwise'}"
    assert counts[name].flops == operations(pairwise, blocks)
    assert counts[name].parameters == EXACT_PARAMETERS[name]


def test_report(monkeypatch, counts):
    monkeypatch.setattr(
        "sasa_det.analysis.san_paper.count_san_row", lambda _, row: counts[row.name]
    )
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in san_paper_report(CONFIGS).splitlines()
    ]
    assert ["SAN10, pairwise", "2.2", "2.16", "10.5", "10,531,848", "74.9"] in cells
    assert ["ResNet-50", "4.1", "4.12", "25.6", "25,557,032", "76.9"] in cells
