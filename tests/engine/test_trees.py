"""The comparison on photographs of trees, with two small ones that are painted."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sasa_det.engine import trees
from sasa_det.engine.experiments import Experiments
from sasa_det.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path):
    """A photograph to train on and one to test on, with bright squares of 20 pixels as trees."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    for split, (height, width) in {"train": (200, 160), "test": (96, 128)}.items():
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        objects = []
        for y in range(5, height - 20, 45):
            for x in range(5, width - 20, 40):
                pixels[y : y + 20, x : x + 20] += 150
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + 20, "ymax": y + 20}
                bndbox = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                objects.append(f"<object><name>Tree</name><bndbox>{bndbox}</bndbox></object>")
        (folder / split).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / split / f"{split}.png")
        xml = f"<annotation>{''.join(objects)}</annotation>"
        (folder / split / f"{split}.xml").write_text(xml)
    return folder


def test_rates_are_chosen_without_the_test_photograph(photographs, tmp_path, monkeypatch):
    """The plan, with outcomes that a record in each folder gives."""
    best = {"conv": 0.003, "SASA": 0.0015, "SASA_conv_stem": 0.006}
    asked = []

    class Recorded(Experiments):
        def _train(self, experiment):
            asked.append(experiment)
            settings = dict(zip(experiment.overrides[::2], experiment.overrides[1::2], strict=True))
            kind = experiment.config.removeprefix("Trees/retinanet_").removesuffix(".yaml")
            is_best = float(settings["SOLVER.BASE_LR"]) == best[kind]
            final = {"bbox/AP": 10.0 + is_best, "bbox/AP50": 30.0 + is_best}
            record = {"settings": self._settings(experiment), "curve": [], "loss": 1.0}
            folder = self._folder(experiment.name)
            folder.mkdir(parents=True)
            (folder / "experiment.json").write_text(json.dumps({**record, "final": final}))

    monkeypatch.setattr(trees, "Experiments", Recorded)
    output = tmp_path / "out"
    text = trees.tune_on_trees(ROOT, output, 1, ["SOLVER.MAX_ITER", "8"], photographs)
    assert len(asked) == 9
    assert not any(str(photographs / "test") in word for e in asked for word in e.overrides)
    assert all(e.overrides[-2:] == ("SOLVER.MAX_ITER", "8") for e in asked)
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:5]] == [
        *("0.003", "0.006", "0.0015"),
    ]
    tried = json.loads((output / "tuning.json").read_text())
    assert tried["attention"]["0.0015"] == {"bbox/AP": 11.0, "bbox/AP50": 31.0}
    # What is evaluated on is above what is trained on.
    photograph = np.asarray(Image.open(photographs / "train" / "train.png"))
    (lower,) = (output / "tuning" / "lower" / "images").iterdir()
    assert (np.asarray(Image.open(lower)) == photograph[50:]).all()
    turned = sorted((output / "tuning" / "held_out" / "images").iterdir())
    upright, *others = (np.asarray(Image.open(path)) for path in turned)
    assert (upright == photograph[:50]).all()
    for turns, image in zip((2, 3, 1), others, strict=True):  # by 180, 270 and 90 degrees
        assert (image == np.rot90(upright, turns)).all()
    content = json.loads((output / "tuning" / "tiles" / "annotations.json").read_text())
    # Rows of four trees begin at 5, 50, 95 and 140.
    assert [image["height"] for image in content["images"]] == [150, 160, 150, 160]
    assert len(content["annotations"]) == 3 * 4 * 4
    held_out = json.loads((output / "tuning" / "held_out" / "annotations.json").read_text())
    upright = [entry for entry in held_out["annotations"] if entry["image_id"] == 1]
    assert [entry["bbox"] for entry in upright] == [[x, 5, 20, 20] for x in (5, 45, 85, 125)]
    assert len(held_out["annotations"]) == 4 * 4
    # Nothing is run again; tiles of other settings are not taken for these.
    asked.clear()
    assert trees.tune_on_trees(ROOT, output, 1, ["SOLVER.MAX_ITER", "8"], photographs) == text
    assert asked == []
    monkeypatch.setattr(trees, "TILE_SIZE", 100)
    with pytest.raises(UsageError, match="lower holds tiles with other settings; name another"):
        trees.tune_on_trees(ROOT, output, 1, ["SOLVER.MAX_ITER", "8"], photographs)


@pytest.mark.slow
def test_a_model_is_trained_evaluated_and_drawn(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "MODELS", {"convolution": "conv"})
    opts = ["SOLVER.MAX_ITER", "5", "INPUT.JITTER.CROP_SIZE", "64", "SOLVER.IMS_PER_BATCH", "2"]
    opts += ["SOLVER.WARMUP_ITERS", "1", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    text = trees.compare_on_trees(ROOT, tmp_path / "out", 1, opts, photographs)
    assert text.startswith("| model ")
    output = tmp_path / "out"
    results = json.loads((output / "results.json").read_text())
    (row,) = results["rows"]
    assert results["AP"]["convolution"] == [[5, row["AP"]]]
    assert row["parameters"] > 1e6 and row["seconds_per_iteration"] > 0
    with Image.open(output / "detections_conv.png") as picture:
        assert picture.width > 2 * 9 * 100
    assert (output / "curves.png").exists()
    assert "5 iterations of 2 crops of 64 x 64 pixels" in (output / "results.md").read_text()
