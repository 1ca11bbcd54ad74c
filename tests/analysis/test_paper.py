"""The picture of Figure 5, and the results it is given."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from sasa_det.analysis.paper import draw_figure_5
from sasa_det.engine import UsageError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    """A picture, written over a file, and its table by model."""
    folder = tmp_path_factory.mktemp("figure")
    output, results = folder / "a.png", folder / "results.json"
    output.write_text("an older picture")
    found = {
        "table1_R26_full": 74.25,
        str(CONFIGS / "Ablations/figure5_baseline_width_0.50.yaml"): 70,
        "table4_k3": 76.1,
        str(CONFIGS / "ImageNet/SASA_R_50_full.yaml"): 77.0,
    }
    results.write_text(json.dumps(found))
    table = draw_figure_5(CONFIGS, output, results, overwrite=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return output, {row[0]: row[1:] for row in rows}


def test_table_holds_what_was_printed_counted_and_found(figure):
    _, rows = figure
    assert rows["ResNet-50 baseline"] == ["8.18", "25.56", "76.9", ""]
    assert rows["ResNet-26 full attention"] == ["4.70", "10.34", "74.8", "74.2"]
    assert rows["width 0.5 baseline"] == ["2.10", "6.92", "", "70.0"]
    assert rows["width 1.5 full attention"] == ["15.39", "38.97", "", ""]
    assert rows["table4_k3"] == ["6.51", "18.02", "", "76.1"]
    assert rows["SASA_R_50_full"] == ["7.18", "18.03", "", "77.0"]
    assert len(rows) == 2 + 9 + 18 + 2


def test_picture_takes_the_place_of_an_older_one(figure):
    with Image.open(figure[0]) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    "content,told",
    [
        ("", "is not JSON: Expecting value"),
        ('{"table1_R50_full": 77.6', "is not JSON: "),
        ("\udcff", "is not JSON: 'utf-8' codec"),
        ("[" * 200_000, "is nested too deeply"),
        ('[["table1_R50_full", 77.6]]', "must hold a JSON object of top-1 accuracies by config"),
        ('{"table1_R50_full": "77.6"}', "of 'table1_R50_full' must be a number of percent from 0 "),
        ('{"table1_R50_full": true}', "must be a number of percent from 0 to 100, got True"),
        ('{"table1_R50_full": NaN}', "must be a number of percent from 0 to 100, got nan"),
        ('{"table1_R50_full": 100.5}', "must be a number of percent from 0 to 100, got 100.5"),
        ('{"table1_R50_full": -1}', "must be a number of percent from 0 to 100, got -1"),
        ('{"table1_R50_full": {"top1": 77.6}}', "must be a number of percent from 0 to 100"),
        ('{"table1_R50_ful": 77.6}', "table7_spatially_aware, figure5_baseline_width_0.25, figure"),
        ('{"table1_R50_ful": 77.6}', "; did you mean table1_R50_full?"),
        ('{"retinanet_R_50": 77.6}', "'retinanet_R_50' must be the path of a classifier's .yaml"),
        ('{"README.md": 77.6}', "'README.md' must be the path of a classifier's .yaml file or one"),
        ('{"table4_k3": 77, "table4_k3": 78}', "'table4_k3' names a config for the second time."),
        (
            '{"table4_k3": 77, "configs/../configs/Ablations/table4_k3.yaml": 78}',
            "names a config for the second time.",
        ),
        (
            '{"configs/COCO-Detection/retinanet_R_50.yaml": 36.5}',
            "must be the config of a classifier, with MODEL.META_ARCHITECTURE Classifier",
        ),
    ],
)
def test_results_that_cannot_be_drawn(tmp_path, content, told):
    results = tmp_path / "results.json"
    results.write_text(content, errors="surrogateescape")
    with pytest.raises(UsageError) as error:
        draw_figure_5(CONFIGS, tmp_path / "a.png", results)
    assert told in str(error.value) and str(results) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.png").exists()


def test_missing_results(tmp_path):
    with pytest.raises(UsageError, match="nowhere.json cannot be read: No such file or directory"):
        draw_figure_5(CONFIGS, tmp_path / "a.png", tmp_path / "nowhere.json")


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs the command in this process; gives exit status and last error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["analyze_model.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/analyze_model.py", run_name="__main__")
        return end.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    return call


def test_command_refuses_what_it_cannot_write(tmp_path, command):
    output = tmp_path / "a.png"
    output.write_text("an older picture")
    status, told = command("--figure", 5, "--output", output)
    assert status == 2
    assert told == f"error: --output {output} exists; it is replaced with --overwrite only."
    assert output.read_text() == "an older picture"
    below = output / "deep" / "b.png"
    (tmp_path / "folder.png").mkdir()
    for path, told in (
        (tmp_path / "a.jpg", "must end in .png."),
        (below, f"cannot be written: {output} is not a folder that can be written to."),
        (tmp_path / "folder.png", "cannot be written: it is a folder."),
    ):
        result = command("--figure", 5, "--overwrite", "--output", path)
        assert result == (2, f"error: --output {path} {told}")


def test_command_counts_a_classifier_on_its_crop(monkeypatch, capsys):
    words = ["analyze_model.py", "--config-file", "configs/Ablations/table6_qr.yaml"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path("tools/analyze_model.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "One image of 224 x 224" in printed
    last = [cell.strip() for cell in printed.strip().splitlines()[-1].split("|")[1:-1]]
    assert last == ["total", "16.78", "6.14"]


def test_command_tells_what_cannot_be_built(command):
    config = ("--config-file", "configs/Ablations/table1_R50_full.yaml")
    status, told = command(*config, "MODEL.SASA.STEM_HEADS", 3)
    assert status == 2 and told.startswith("error: ") and "64" in told


@pytest.mark.parametrize(
    "words,told",
    [
        (("--figure", 5, "--size", 224, 224), "--size and config overrides need --config-file."),
        (("--paper", "MODEL.DEVICE", "cpu"), "--size and config overrides need --config-file."),
        (("--paper", "--results", "a.json"), "--results and --overwrite need --figure."),
        (("--figure", 4), "invalid choice: 4 (choose from 5)"),
        (("--paper", "--figure", 5), "argument --figure: not allowed with argument --paper"),
    ],
)
def test_command_refuses_flags_of_other_uses(command, words, told):
    status, error = command(*words)
    assert status == 2 and error.endswith(told)
