"""The probe of robustness as a user types it, and the classifiers that it trains."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from sasa_det.config.load import load_config
from sasa_det.data import register_image_folder, write_digit_crops
from sasa_det.engine import probe_robustness, studies
from sasa_det.engine.probe_robustness import CLASSIFIERS, every_nth, probe_robustness_parser
from sasa_det.engine.robustness_report import robustness_report
from sasa_det.engine.train import run_train_imagenet, train_imagenet_parser
from sasa_det.evaluation.robustness import TRANSFORMS, Attack
from sasa_det.modeling import SAN, SASAResNet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops") / "crops"
    write_digit_crops(folder, num_train=20, num_val=20)
    return folder


@pytest.fixture(scope="module")
def classifiers(crops, tmp_path_factory):
    """Checkpoints of two tiny classifiers, of the seeds 1 and 2, and their top-1."""
    folder = tmp_path_factory.mktemp("classifiers")
    files, top1 = [], []
    for seed in (1, 2):
        words = ["--config-file", "Quick/classifier_SASA.yaml", "--data", crops]
        words += ["SEED", seed, "SOLVER.MAX_ITER", 4, "SOLVER.MAX_EPOCHS", 0.0]
        words += ["SOLVER.WARMUP_EPOCHS", 0.0, "TEST.EVAL_EPOCHS", 0.0, "TEST.EVAL_PERIOD", 4]
        words += ["OUTPUT_DIR", folder / str(seed)]
        run_train_imagenet(train_imagenet_parser().parse_args(list(map(str, words))))
        files.append(folder / str(seed) / "model_final.pth")
        records = (folder / str(seed) / "metrics.json").read_text().splitlines()
        top1.append(json.loads(records[-1])["classification/top1"])
    return files, top1


@pytest.fixture
def tool(monkeypatch, capsys):
    """Return a function that runs the tool and gives its exit status and what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tools/probe_robustness.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/probe_robustness.py", run_name="__main__")
        output = capsys.readouterr()
        return end.value.code, output.out + output.err

    return call


def test_seeds_of_one_kind_are_probed_together(tool, classifiers, crops, tmp_path):
    files, top1 = classifiers
    output = tmp_path / "probe"
    words = ["--weights", "tiny", *files, "--weights", "first", files[0], "--data", crops]
    words += ["--output", output, "--epsilon", 8, 2, "--steps", 2]
    status, printed = tool(*words, "MODEL.DEVICE", "cpu")
    assert status == 0, printed
    record = json.loads((output / "robustness.json").read_text())
    names = [*TRANSFORMS, "attacked by 8", "attacked by 2"]
    assert list(record["top1"]) == ["tiny", "first"]
    assert all(list(found) == names for found in record["top1"].values())
    # What training's own evaluation found, of each seed.
    assert record["top1"]["tiny"]["untouched"] == top1
    assert record["top1"]["first"] == {
        name: values[:1] for name, values in record["top1"]["tiny"].items()
    }
    assert record["attacks"] == [
        {"epsilon": 8.0, "step": 2.0, "steps": 2, "seed": 0},
        {"epsilon": 2.0, "step": 0.5, "steps": 2, "seed": 0},
    ]
    assert record["weights"]["tiny"] == list(map(str, files))
    text = (output / "robustness.md").read_text()
    assert text in printed and "PGD of 2 steps of 0.5 within 2 of 255; all images of " in text
    with Image.open(output / "robustness.png") as image:
        assert image.format == "PNG" and image.width > 500
    status, printed = tool(*words)
    assert status == 2 and "exists already" in printed


def test_mistakes_are_told_before_anything_is_probed(tool, classifiers, crops, tmp_path):
    files, _ = classifiers
    detector = "Digits/retinanet_SASA.yaml"

    def refused(*words):
        status, printed = tool(*words, "--output", tmp_path / "probe")
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in printed, printed
        assert "Probing" not in printed and not (tmp_path / "probe").exists()
        return errors[0]

    assert "must have checkpoints after the name 'tiny'" in refused("--weights", "tiny")
    twice = ["--weights", "tiny", files[0], "--weights", "tiny", files[1]]
    assert "has the name 'tiny' twice" in refused(*twice)
    assert "must be a Classifier" in refused("--weights", "a", files[0], detector, "--data", crops)
    missing = refused("--weights", "a", files[0], tmp_path / "none.pth", "--data", crops)
    assert "none.pth" in missing
    other = tmp_path / "other"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (other / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(other / split / name / "1.png")
    told = refused("--weights", "a", files[0], "--data", other)
    assert f"tells 10 classes apart, and {other / 'val'} has 2" in told
    assert "--overwrite need --weights" in refused("--train", "--dataset", "digit_crops_val")
    told = refused("--train", "--config-file", "Animals/classifier_cnv.yaml")
    assert "--config-file Animals/classifier_cnv.yaml does not exist in " in told


def test_what_was_found_is_kept_with_its_settings(classifiers, crops, tmp_path):
    file = tmp_path / "model_final.pth"
    shutil.copy(classifiers[0][0], file)
    data = register_image_folder(crops)[1]
    attacks, opts = [Attack(8, 2, 1)], ["MODEL.DEVICE", "cpu"]
    probe = probe_robustness._Probe(data, 2, attacks, opts, keep=True)
    found = probe(file)
    assert found["mirrored"] in {10.0 * hits for hits in range(11)}  # 10 of 20 images
    shutil.copy(classifiers[0][1], file)
    assert probe(file) == found  # not probed again
    other = probe_robustness._Probe(data, 1, attacks, opts, keep=True)
    assert other(file)["untouched"] == classifiers[1][1]


def test_every_nth_image_over_all_batches():
    sizes, images, place = [3, 1, 0, 4, 5], torch.arange(13), 0
    batches = []
    for size in sizes:
        part = images[place : place + size]
        batches.append({"image": part, "label": part + 100, "unreadable": [place]})
        place += size
    for n in (1, 2, 3, 5, 20):
        kept = list(every_nth(n, batches))
        assert torch.cat([batch["image"] for batch in kept]).tolist() == list(range(0, 13, n))
        assert all(torch.equal(batch["label"], batch["image"] + 100) for batch in kept)
        assert [batch["unreadable"] for batch in kept] == [[0], [3], [4], [4], [8]]


def test_classifiers_to_train_are_of_equal_widths():
    models = {}
    config = probe_robustness_parser().get_default("config_file")
    for variant in CLASSIFIERS.variants:
        assert len(variant.rates) == 3
        opts = ("MODEL.DEVICE", "meta")
        planned = studies._experiment(variant, "animals", 0.01, 2, config, opts)
        file = ROOT / "configs" / config
        cfg = load_config(str(file), list(planned.overrides))
        with torch.device("meta"):
            models[variant.name] = build_model(cfg)
    convolution, local, pairwise, patchwise = (model.backbone for model in models.values())
    assert isinstance(convolution, SASAResNet) and isinstance(local, SASAResNet)
    assert isinstance(pairwise, SAN) and isinstance(patchwise, SAN)
    kinds = {name: {type(m).__name__ for m in model.modules()} for name, model in models.items()}
    assert "LocalSelfAttention2d" in kinds["local attention"] - kinds["convolution"]
    assert "PairwiseAttention2d" in kinds["pairwise attention"]
    assert "PatchwiseAttention2d" in kinds["patchwise attention"]
    for model in models.values():
        assert model.head.in_features == 512 and model.num_classes == 10


def test_report():
    top1 = {
        "conv": {"untouched": [90.0, 92.0], "mirrored": [50.0, 48.0], "turned": [80.0, 82.0]},
        "pair": {"untouched": [91.0, 91.0], "mirrored": [81.0, 79.0], "turned": [41.0, 41.0]},
    }
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in robustness_report(top1).splitlines()
    ]
    assert ["pair", "91.0 ± 0.0", "80.0 ± 1.4", "41.0 ± 0.0"] in cells
    assert ["conv", "42.0 ± 2.8", "10.0 ± 0.0"] in cells
    assert ["pair", "11.0 ± 1.4", "50.0 ± 0.0"] in cells
    # Variances of 8 and 2 with two seeds each.
    assert ["pair", "-31.0 ± 2.2", "+40.0 ± 0.0"] in cells
    assert ["mirrored", "pair, conv", "pair, conv"] in cells
    assert ["turned", "conv, pair", "conv, pair"] in cells


def test_report_of_a_classifier_that_has_little_to_lose():
    top1 = {
        "good": {"untouched": [90.0], "turned": [50.0]},
        "bad": {"untouched": [12.0], "turned": [9.0]},
    }
    assert "| turned   | good, bad" in robustness_report(top1)
    assert "| bad, good " in robustness_report(top1)
