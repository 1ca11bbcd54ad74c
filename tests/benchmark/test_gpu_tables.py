"""The report of measurements on a GPU, from numbers that are given."""

import json

from sasa_det.benchmark.gpu_tables import (
    Ceilings,
    Choice,
    Errors,
    Measured,
    Row,
    as_json,
    as_markdown,
    choices_table,
    layers_table,
    models_table,
)
from sasa_det.ops.cuda_compiler import Resources
from sasa_det.ops.gpu_prediction import GPUS, WHOLE, Times

LAYERS = [
    Row("64@160", "convolution", 50e-6, 151e-6, 3),
    Row("64@160", "attention", 100e-6, 453e-6, 3),
    Row("64@160", "HaloAttn (timm)", 900e-6, 2700e-6, 3),
    Row("256@5", "convolution", 5e-6, 15e-6, 8),
    Row("256@5", "attention", 4e-6, 30e-6, 8),
    Row("256@5", "HaloAttn (timm)", None, None, 8, "AssertionError: 5 is odd"),
    Row("64@160", "FlexAttention in tiles", None, None, 3, "it takes wider heads"),
]


def cells(table):
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_layers_and_their_sum():
    first, second, whole = cells(layers_table(LAYERS, {}))
    assert first == {
        "layer": "64@160",
        "times": "3",
        "convolution": "50 / 151",
        "attention": "100 / 453",
        "ratio": "2.00 / 3.00",
        "HaloAttn (timm)": "900 / 2700",
        "FlexAttention in tiles": "",
    }
    assert second["ratio"] == "0.80 / 2.00" and second["HaloAttn (timm)"] == ""
    # 3 * 50 + 8 * 5, 3 * 151 + 8 * 15; 3 * 100 + 8 * 4, 3 * 453 + 8 * 30.
    assert whole["convolution"] == "190 / 573" and whole["attention"] == "332 / 1599"
    assert whole["ratio"] == f"{332 / 190:.2f} / {1599 / 573:.2f}"
    # A sum without one of its terms would mislead.
    assert whole["HaloAttn (timm)"] == whole["FlexAttention in tiles"] == ""


def test_predictions_stand_beside_what_was_measured():
    predicted = {
        "64@160": (Times(40e-6, 80e-6), Times(120e-6, 240e-6)),
        WHOLE: (Times(1e-3, 2e-3), Times(1e-3, 3.5e-3)),
    }
    first, second, whole = cells(layers_table(LAYERS, predicted))
    assert first["convolution, predicted"] == "40 / 120"
    assert first["attention, predicted"] == "120 / 360"
    assert first["ratio, predicted"] == "3.00 / 3.00"
    assert second["attention, predicted"] == ""
    assert whole["ratio, predicted"] == "1.00 / 1.50"


def test_a_time_that_is_missing_is_not_a_number():
    rows = [Row("8@8", "convolution", 1e-6, None), Row("8@8", "attention", 2e-6, 3e-6)]
    (row,) = cells(layers_table(rows, {}))
    assert row["convolution"] == "1 / ?" and row["ratio"] == ""


def test_models_are_compared_with_the_first():
    rows = [Row("convolutional", "", 10e-3, 30e-3), Row("attentional", "", 8e-3, 33e-3)]
    assert cells(models_table(rows)) == [
        {"model": "convolutional", "ms": "10.00 / 30.00", "ratio": "1.00 / 1.00"},
        {"model": "attentional", "ms": "8.00 / 33.00", "ratio": "0.80 / 1.10"},
    ]


CHOICES = [
    Choice("forward", "64@160", "2 parts, 3 blocks", True, Resources(168, 48), 100e-6),
    Choice("forward", "64@160", "1 part, 3 blocks", False, Resources(80, 0), 90e-6),
    Choice("forward", "64@160", "2 parts, 4 blocks", False, None, None, "it does not start"),
    Choice("key", "512@20", "2 parts, 2 blocks", True, Resources(255, 104), 12e-6),
    Choice("key", "512@20", "1 part, 2 blocks", False, Resources(128, 0), 15e-6),
]


def test_the_fastest_choice_is_named():
    first, second = cells(choices_table(CHOICES))
    assert first == {
        "kernel": "forward",
        "layer": "64@160",
        "in use": "100 (2 parts, 3 blocks, 168 registers, 48 bytes spilled)",
        "second choice": "90 (1 part, 3 blocks, 80 registers, 0 bytes spilled)",
        "third choice": "? (2 parts, 4 blocks)",
        "fastest": "1 part, 3 blocks",
        "of the one in use": "0.90",
    }
    assert second["fastest"] == "2 parts, 2 blocks"
    assert second["of the one in use"] == "1.00"
    assert second["third choice"] == ""


def test_the_whole_report():
    errors = [
        Errors("bfloat16", 32, 7, "all", {"output": 0.0031, "grad_query": 0.0042, "layer": 0.0051}),
        Errors("float16", 8, 7, "all", {}, "an illegal memory access was encountered"),
    ]
    measured = Measured("Some GPU, 2026-01-01", "cuda", errors, Ceilings(2.9e12, 601e12), LAYERS)
    measured.choices = CHOICES
    measured.notes.append("Models were left out, as detectron2 is not installed.")
    text = as_markdown(measured, {}, GPUS[0])
    assert text.startswith("Some GPU, 2026-01-01. Attention ran on the backend `cuda`.\n")
    assert "| bfloat16 | 32 | 7 | all | 3.1e-03 | 4.2e-03 |  |  |  |  | 5.1e-03 | none |" in text
    assert "| float16 | 8 | 7 | all |  |  |  |  |  |  |  | an illegal memory access was " in text
    assert "2.90 TB/s (predictions assume 3.00)" in text
    assert "601 TFLOP/s (predictions assume 550)" in text
    missing = "- 256@5, HaloAttn (timm): AssertionError: 5 is odd\n"
    missing += "- 64@160, FlexAttention in tiles: it takes wider heads\n"
    missing += "- 64@160, forward with 2 parts, 4 blocks: it does not start\n"
    assert f"\n\nNot measured:\n\n{missing}\n" in text
    assert text.endswith("Models were left out, as detectron2 is not installed.\n")
    # A report of what has been measured so far is whole too.
    assert as_markdown(Measured("Some GPU", "triton"), {}, None).count("\n") == 1

    record = json.loads(as_json(measured, {WHOLE: (Times(1.0, 2.0), Times(3.0, 4.0))}))
    assert record["layers"][1]["step"] == 453e-6
    assert record["choices"][1]["taken"] == {"registers": 80, "spill_bytes": 0}
    assert record["ceilings"] == {"copy": 2.9e12, "product": 601e12}
    assert record["predicted"][WHOLE]["attention"] == {"forward": 3.0, "backward": 4.0}
