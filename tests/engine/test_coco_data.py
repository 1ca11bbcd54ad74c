"""Runs on COCO jsons that hold more, or other things, than a detector of boxes needs."""

import json
import shutil

import pytest

from sasa_det.checkpoint import read_checkpoint
from sasa_det.engine import argument_parser, run

CONFIG = "configs/Quick/retinanet_SASA.yaml"


@pytest.fixture
def data(digits, tmp_path):
    """The folder of a copy of the small data set."""
    return shutil.copytree(digits, tmp_path / "data")


@pytest.fixture
def train(tmp_path, capfd):
    """Return a function that trains on data in a folder and gives exit status and output."""

    def call(data, *words):
        flags = ["--train", data / "train.json", data / "train"]
        flags += ["--test", data / "val.json", data / "val", "--config-file", CONFIG, *words]
        if "SOLVER.MAX_ITER" not in words:
            flags += ["SOLVER.MAX_ITER", 2]
        flags += ["OUTPUT_DIR", tmp_path / "run"]
        status = run(argument_parser().parse_args([str(word) for word in flags]))
        return status, "".join(capfd.readouterr())

    return call


def edit(data, change, names=("train", "val")):
    for name in names:
        path = data / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def test_masks_and_keypoints_that_cannot_be_used_are_left_alone(train, data):
    unusable = [{"segmentation": [[]]}, {"segmentation": [1, 2, 3, 4]}, {"keypoints": ["nose"]}]
    unusable += [{"keypoints": [None, 1, 2]}, {"segmentation": {"size": [64, 64], "counts": "1"}}]

    def spoil(content):
        for index, entry in enumerate(content["annotations"]):
            entry |= unusable[index % len(unusable)]

    edit(data, spoil)
    status, output = train(data)
    assert status == 0, output
    assert "train.json: unusable keypoints: " in output
    assert "train.json: unusable segmentations: " in output
    assert "train.json: annotations without a usable polygon: " in output
    # detectron2's own loading would have dropped objects.
    assert "Filtered out" not in output and "Removed 0 images with no usable annotations" in output


def test_nothing_to_train_on_is_refused_before_any_work(train, data, tmp_path):
    def move_out(content):
        for entry in content["annotations"]:
            entry["bbox"][0] += 1000

    edit(data, move_out)
    status, output = train(data)
    assert status == 2 and "error: " in output and "training leaves them out" in output
    assert "Traceback" not in output and not (tmp_path / "run").exists()


def test_likely_mistakes_are_named_with_the_share_of_boxes(train, data):
    def spoil(content):
        for index, entry in enumerate(content["annotations"]):
            # Half of them in 0..1, and all of area 0.
            entry["bbox"] = [number / (64 if index % 2 else 1) for number in entry["bbox"]]
            entry["area"] = 0

    edit(data, spoil)
    status, output = train(data)
    assert status == 0, output
    number = len(json.loads((data / "train.json").read_text())["annotations"])
    share = f"{number // 2} of {number}, {number // 2 / number:.1%}"
    assert f"train.json: boxes within 0..1: {share} (annotation 2" in output
    assert "probably fractions of the image's size" in output
    assert "probably areas that were never computed" in output


def test_a_class_name_cannot_steer_the_terminal(train, data, tmp_path):
    def rename(content):
        content["categories"][0]["name"] = "zero\x1b[2J\x1b]0;title\x07"

    edit(data, rename)
    status, output = train(data, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    assert status == 0, output
    log = (tmp_path / "run" / "log.txt").read_text()
    # In the histogram of the classes, which cuts names, and among the metrics.
    for text in (output, log):
        assert "zero\\x1b[2J" in text
        assert not any(mark in text for mark in ("\x1b[2J", "\x1b]", "\x07"))


def test_data_that_moved_as_a_whole_are_resumed_and_others_refused(train, data, tmp_path):
    assert train(data)[0] == 0
    stored = (tmp_path / "run" / "config.yaml").read_text()
    other = shutil.copytree(data, tmp_path / "other")
    edit(other, lambda content: content["annotations"].pop(), names=("train",))
    more = ("--resume", "SOLVER.MAX_ITER", 4)
    status, output = train(other, *more)
    assert status == 2 and "the training data are not those that the checkpoint" in output
    assert (tmp_path / "run" / "config.yaml").read_text() == stored

    moved = data.rename(tmp_path / "moved")
    status, output = train(moved, *more)
    assert status == 0, output
    assert "Starting training from iteration 2" in output
    assert read_checkpoint(tmp_path / "run" / "model_final.pth")["iteration"] == 3
    assert str(moved) in (tmp_path / "run" / "config.yaml").read_text()
