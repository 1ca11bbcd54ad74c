"""The command that predicts, on the outputs that it writes."""

import csv
import json
import os
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.layers import batched_nms
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det.command_line import run_command
from sasa_det.engine import UsageError
from sasa_det.engine.predict import predict_parser, run_predict
from sasa_det.errors import CheckpointError
from sasa_det.evaluation.drawing import enlarged


@pytest.fixture
def predict(trained, digits):
    """Return a function that predicts in this process, on the images of ``digits`` by default."""

    def call(*words, data=("--input", digits / "train"), weights=trained):
        words = ["--weights", weights, *data, *words]
        return run_predict(predict_parser().parse_args([str(word) for word in words]))

    return call


def average_precision(json_file, results):
    truth = COCO(json_file)
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def last_metrics(folder):
    (*_, last) = (folder / "metrics.json").read_text().splitlines()
    return json.loads(last)


def test_results_have_the_ap_of_the_evaluation(predict, trained, digits, tmp_path):
    results = tmp_path / "results.json"
    data = ["--test", digits / "train.json", digits / "train"]
    assert predict("--json", results, "--confidence-threshold", "0.05", data=data) == 0
    expected = last_metrics(trained.parent)["bbox/AP"]
    assert expected > 10
    # The norms of the predictor's model are fused, which changes digits at the end.
    assert average_precision(digits / "train.json", results) == pytest.approx(expected, abs=0.1)
    assert not (tmp_path / "results_images.json").exists()


def test_pictures_and_tables(predict, digits, tmp_path):
    output, results = tmp_path / "out", tmp_path / "tables" / "results.json"
    table = tmp_path / "table.csv"
    threshold = "--confidence-threshold", "0.3"
    assert predict("--output", output, "--json", results, "--csv", table, *threshold) == 0
    files = sorted(digits.glob("train/*.png"))
    assert sorted(path.name for path in output.iterdir()) == [file.name for file in files]
    found = json.loads(results.read_text())
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert len(found) == len(rows) > 5
    for result, row in zip(found, rows, strict=True):
        x, y, width, height = result["bbox"]
        assert result["score"] >= 0.3 and row["file_name"] == result["file_name"]
        assert float(row["score"]) == result["score"] and row["frame"] == ""
        corners = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
        assert corners == pytest.approx([x, y, x + width, y + height])
        # The ids of the data that it was trained on, which begin with 1.
        assert result["category_id"] == int(row["class_id"]) == int(row["class_name"]) + 1
    images = COCO(tmp_path / "tables" / "results_images.json")
    assert [image["file_name"] for image in images.loadImgs(images.getImgIds())] == [
        file.name for file in files
    ]
    assert len(images.loadRes(str(results)).anns) == len(found)
    for file in files:
        before, after = (np.array(Image.open(p).convert("RGB")) for p in (file, output / file.name))
        drawn = {result["file_name"] for result in found}
        changed = file.name in drawn
        assert after.shape == (512, 512, 3) and (enlarged(before) != after).any() == changed


def test_unreadable_files_are_named_and_left_out(predict, digits, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("empty.png", "broken.jpg", "clip.mp4"):
        (folder / name).write_bytes(b"" if name == "empty.png" else b"neither image nor video")
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(folder / "deep.png")
    data = ["--input", folder, folder / "clip.mp4"]
    assert predict("--output", tmp_path / "out", "--json", tmp_path / "x.json", data=data) == 1
    printed = capsys.readouterr().out
    for words in (
        f"Skipped: image {folder}/broken.jpg is not an image",
        f"Skipped: image {folder}/deep.png has pixels of more than 8 bits",
        f"Skipped: image {folder}/empty.png is empty",
        f"Skipped: video {folder}/clip.mp4 cannot be read by OpenCV",
        "4 of 4 files could not be read",
        "No image could be read, and nothing was written.",
    ):
        assert words in printed
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    # One that can be read makes it a success.
    shutil.copy(next(digits.glob("train/*.png")), folder / "good.png")
    assert predict("--output", tmp_path / "out", data=data) == 0
    assert "4 of 5 files could not be read" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


def make_video(path, images):
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), code, 5, (64, 64))
    for image in images:
        writer.write(cv2.imread(str(image)))
    writer.release()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_video_that_is_not_written_whole_is_an_error(predict, digits, tmp_path, overwrite):
    """A limit on the size of files stands for a full disk: OpenCV says of neither."""
    make_video(tmp_path / "clip.avi", sorted(digits.glob("train/*.png")))
    out = tmp_path / "out"
    words = ["--output", out, *(["--overwrite"] if overwrite else [])]
    if overwrite:
        assert predict(*words, data=("--input", tmp_path / "clip.avi")) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*")}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIGXFSZ
    ignored = signal.signal(handler, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"clip.avi.mp4 could not be written whole; the disk"):
            predict(*words, data=("--input", tmp_path / "clip.avi"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(handler, ignored)
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before


def test_videos(predict, digits, tmp_path):
    make_video(tmp_path / "clip.avi", sorted(digits.glob("train/*.png")))
    shutil.copy(tmp_path / "clip.avi", tmp_path / "more.avi")
    image = next(digits.glob("train/*.png"))
    data = ["--input", tmp_path / "clip.avi", tmp_path / "more.avi", image]
    words = ["--output", tmp_path / "out", "--json", tmp_path / "x.json"]
    # Batches end in the middle of a video, and hold two of them.
    assert predict(*words, "--batch-size", "5", "--confidence-threshold", "0.2", data=data) == 0
    for name in ("clip.avi.mp4", "more.avi.mp4"):
        video = cv2.VideoCapture(str(tmp_path / "out" / name))
        assert video.get(cv2.CAP_PROP_FPS) == 5
        shapes = []
        while (frame := video.read())[0]:
            shapes.append(frame[1].shape)
        assert shapes == [(512, 512, 3)] * 8
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"clip.avi.mp4", "more.avi.mp4", image.name}
    found = json.loads((tmp_path / "x.json").read_text())
    images = json.loads((tmp_path / "x_images.json").read_text())["images"]
    places = [(i["file_name"], i.get("frame")) for i in images]
    expected = [(name, frame) for name in ("clip.avi", "more.avi") for frame in range(8)]
    assert places == [*expected, (image.name, None)]
    assert [i["id"] for i in images] == list(range(1, 18))
    boxes = {name: [] for name in ("clip.avi", "more.avi")}
    for result in found:
        assert places[result["image_id"] - 1] == (result["file_name"], result.get("frame"))
        if result["file_name"] in boxes:
            boxes[result["file_name"]].append((result["frame"], *result["bbox"]))
    assert len(boxes["clip.avi"]) > 5
    np.testing.assert_allclose(boxes["clip.avi"], boxes["more.avi"], atol=1e-3)


def suppressed(results):
    """Return COCO results after one more non-maximum suppression in each image and class.

    detectron2 cuts boxes off at the border after its own, which merging augmented images sees.
    """
    boxes = torch.tensor([result["bbox"] for result in results])
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.tensor([result["score"] for result in results])
    groups = [1000 * result["image_id"] + result["category_id"] for result in results]
    kept = batched_nms(boxes, scores, torch.tensor(groups), 0.5)
    return [results[index] for index in sorted(kept.tolist())]


def test_tiles_and_augmentation(predict, digits, tmp_path):
    """Tiles as large as the image, and one augmentation that leaves it as it is."""
    files = {name: tmp_path / f"{name}.json" for name in ("plain", "tiles", "augmented")}
    options = {
        "plain": [],
        "tiles": ["--tile", "64", "--overlap", "0.5"],
        "augmented": ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"],
    }
    options["augmented"] += ["TEST.AUG.FLIP", "False"]
    found = {}
    for name, file in files.items():
        assert predict("--json", file, *options[name]) == 0
        found[name] = json.loads(file.read_text())
    assert len(found["plain"]) > 3
    for name, expected in (("tiles", found["plain"]), ("augmented", suppressed(found["plain"]))):
        assert len(found[name]) == len(expected)
        for one, other in zip(found[name], expected, strict=True):
            assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def test_outputs_that_exist_are_replaced_only_if_asked(predict, tmp_path):
    folder, table = tmp_path / "out", tmp_path / "x.csv"
    folder.mkdir()
    (folder / "keep.txt").write_text("mine")
    table.write_text("mine")
    for words in (["--output", folder], ["--csv", table], ["--json", tmp_path]):
        with pytest.raises(UsageError, match=r"^output .* (exists|is a folder)"):
            predict(*words)
    (tmp_path / "x_images.json").write_text("mine")
    with pytest.raises(
        UsageError, match="x_images.json exists already; name another one, or give --overwrite"
    ):
        predict("--json", tmp_path / "x.json")
    assert table.read_text() == "mine" and len(list(folder.iterdir())) == 1
    assert predict("--output", folder, "--csv", table, "--overwrite") == 0
    assert table.read_text().startswith("file_name,") and (folder / "keep.txt").exists()


@pytest.mark.parametrize(
    "words, sentence",
    (
        ([], "there is nothing to write: give --output, --json or --csv."),
        (["--json", "{tmp}/a", "--csv", "{tmp}/a"], "--json and --csv must name different files."),
        (["--csv", "{tmp}/a", "--overlap", "0.1"], "--overlap is for tiles: give their size with"),
        (["--csv", "{tmp}/a", "SEED"], "config overrides must be KEY VALUE pairs, got 'SEED'."),
        (["--csv", "{tmp}/a", "SEDE", "1"], "config key SEDE does not exist; did you mean SEED?"),
        (["--csv", "{tmp}/a", "MODEL.DEVICE", "tpu"], "MODEL.DEVICE must be cpu, cuda or cuda:N"),
        (["--output", "{digits}/train", "--overwrite"], "is an input, and must not be an output"),
        (["--csv", "{weights}", "--overwrite"], "is an input, and must not be an output as well."),
        (["--csv", "{weights}/a"], "cannot be written: {weights} is not a folder."),
        (
            ["--csv", "{tmp}/a", "--input", "{digits}/train", "SEED", "3"],
            "SEED stands among the words of --input; put the KEY VALUE pairs behind another flag",
        ),
        (
            ["--output", "{tmp}/a", "--input", "{digits}/train", "{tmp}/000001.png"],
            "/000001.png would be written twice, for {digits}/train/000001.png and for",
        ),
        (
            [
                "--csv",
                "{tmp}/a",
                "TEST.AUG.ENABLED",
                "True",
                "MODEL.META_ARCHITECTURE",
                "Classifier",
            ],
            "is a Classifier, which classifies whole images and finds no objects",
        ),
    ),
)
def test_mistakes(predict, trained, digits, tmp_path, words, sentence):
    shutil.copy(next(digits.glob("train/*.png")), tmp_path / "000001.png")
    names = {"tmp": tmp_path, "digits": digits, "weights": trained}
    with pytest.raises((UsageError, CheckpointError)) as error:
        predict(*(word.format(**names) for word in words))
    assert sentence.format(**names) in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]


@pytest.mark.parametrize(
    "words, sentence",
    (
        (["--confidence-threshold", "1.5"], "must be a number from 0 to 1, got '1.5'"),
        (["--confidence-threshold", "nan"], "must be a number from 0 to 1, got 'nan'"),
        (["--overlap", "1"], "must be below 1, got '1'"),
        (["--tile", "0"], "must be an integer of at least 1, got '0'"),
        (["--batch-size", "-1"], "must be an integer of at least 1, got '-1'"),
    ),
)
def test_numbers_out_of_range(predict, tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit) as error:
        predict("--csv", tmp_path / "x", *words)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_other_classes_than_those_of_the_json(predict, digits, tmp_path):
    content = json.loads((digits / "train.json").read_text())
    content["categories"][3]["name"] = "three"
    (tmp_path / "other.json").write_text(json.dumps(content))
    data = ["--test", tmp_path / "other.json", digits / "train"]
    with pytest.raises(UsageError, match="has no category '3', and the model has 0, 1, 2 and 7 m"):
        predict("--json", tmp_path / "x.json", data=data)
    # In another order, and with other ids, they are found by their names.
    content = json.loads((digits / "train.json").read_text())
    for category in content["categories"]:
        category["id"] = 100 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    threshold = "--confidence-threshold", "0.05"
    assert predict("--json", tmp_path / "x.json", *threshold, data=data) == 0
    plain = ["--test", digits / "train.json", digits / "train"]
    assert predict("--json", tmp_path / "y.json", *threshold, data=plain) == 0
    expected = average_precision(digits / "train.json", tmp_path / "y.json")
    found = average_precision(tmp_path / "other.json", tmp_path / "x.json")
    assert found == pytest.approx(expected) and found > 10


def test_the_command(trained, digits, tmp_path, monkeypatch, capsys):
    image = next(digits.glob("train/*.png"))
    words = ["--weights", trained, "--input", image, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["tools/predict.py", *map(str, words)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path("tools/predict.py", run_name="__main__")
    assert (tmp_path / "out" / image.name).is_file() and "image/s" in capsys.readouterr().err


def test_a_mistake_is_one_sentence(predict, tmp_path, capsys):
    words = ["--output", tmp_path / "out"]
    assert run_command(lambda: predict(*words, weights=tmp_path / "no.pth")) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/no.pth cannot be read (No such file or directory).\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_no_part_of_a_video(trained, digits, start, tmp_path):
    frame = cv2.imread(str(next(digits.glob("train/*.png"))))
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), code, 5, (64, 64))
    for _ in range(2000):
        writer.write(frame)
    writer.release()
    words = ["--weights", trained, "--input", tmp_path / "clip.avi", "--output", tmp_path / "out"]
    process = start(tool="tools/predict.py", data=words)
    while not any((tmp_path / "out").glob(".writing*")):
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in output
    assert list(Path(tmp_path, "out").iterdir()) == []


AUGMENTATION = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", False]


def test_training_ends_with_augmentation(command, tmp_path):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox_TTA','AP',0.0,100.0]]"]
    run = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    assert command(*run, *AUGMENTATION, *expected) == 0
    metrics = last_metrics(tmp_path / "run")
    assert {"bbox/AP50", "bbox_TTA/AP50"} <= metrics.keys()
    # At the end alone, as in detectron2.
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("Results on ") == 3
    assert log.count("Evaluating with test-time augmentation.") == 1


def test_evaluation_with_augmentation(command, predict, trained, digits, tmp_path):
    """One that leaves the images as they are, and one of more sizes."""
    data = {"test": (digits / "train.json", digits / "train")}
    run = ["--eval-only", "MODEL.WEIGHTS", trained, "MODEL.SASA.NUM_HEADS", 2, "SEED", 1]
    run += ["MODEL.SASA.ATTENTION_STAGES", "['res3', 'res5']", *AUGMENTATION]
    assert command(*run, **data) == 0
    folders = [tmp_path / "run" / "inference" / part for part in ("", "TTA")]
    plain, same = (next(f.glob("*/coco_instances_results.json")) for f in folders if f.exists())
    again = tmp_path / "again.json"
    again.write_text(json.dumps(suppressed(json.loads(plain.read_text()))))
    average = {
        name: average_precision(digits / "train.json", file)
        for name, file in (("plain", plain), ("again", again), ("same", same))
    }
    assert average["plain"] > 10
    assert average["same"] == pytest.approx(average["again"], abs=0.1)
    sizes = ["TEST.AUG.MIN_SIZES", "(56, 64, 72)"]
    assert command(*run, *sizes, "OUTPUT_DIR", tmp_path / "more", **data) == 0
    more = next((tmp_path / "more/inference/TTA").glob("*/coco_instances_results.json"))
    results = tmp_path / "results.json"
    words = [str(word) for word in (*AUGMENTATION, *sizes)]
    data = ["--test", digits / "train.json", digits / "train"]
    assert predict("--json", results, "--confidence-threshold", "0.05", *words, data=data) == 0
    expected = average_precision(digits / "train.json", more)
    assert expected != average["plain"]
    assert average_precision(digits / "train.json", results) == pytest.approx(expected, abs=0.1)


def test_augmentation_that_does_not_exist_is_refused(command, tmp_path, capsys):
    options = ["TEST.AUG.ENABLED", True, "MODEL.META_ARCHITECTURE", "PanopticFPN"]
    assert command(*options) == 2
    assert "TEST.AUG.ENABLED must be False for MODEL.META_ARCHITECTURE PanopticFPN" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
