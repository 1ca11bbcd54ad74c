"""The commands that show what a detector looks at, finds and is trained on, as users type them."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sasa_det.command_line import run_command
from sasa_det.data.images import read_image
from sasa_det.evaluation.drawing import enlarged


@pytest.fixture
def tool(monkeypatch, capsys):
    """Return a function that runs a tool and gives its exit status and what it printed."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(f"tools/{name}.py", run_name="__main__")
        output = capsys.readouterr()
        return end.value.code, output.out + output.err

    return call


@pytest.fixture
def refused(tool):
    """Return a function that runs a tool that must refuse, in one sentence, and gives it."""

    def call(name, *words):
        status, output = tool(name, *words)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in output, output
        return errors[0]

    return call


@pytest.fixture(scope="module")
def results(trained, digits, tmp_path_factory):
    """COCO results of the trained detector on the images that it knows."""
    from sasa_det.engine.predict import predict_parser, run_predict

    path = tmp_path_factory.mktemp("results") / "results.json"
    words = ["--weights", trained, "--test", digits / "train.json", digits / "train"]
    words += ["--json", path, "--confidence-threshold", 0.05]
    assert run_command(lambda: run_predict(predict_parser().parse_args(map(str, words)))) == 0
    return path


def images_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.*"))


def test_attention(tool, refused, trained, digits, tmp_path):
    image = sorted((digits / "val").glob("*.png"))[0]
    output = tmp_path / "maps" / "attention.png"
    words = ["--weights", trained, "--input", image, "--output", output]
    status, text = tool("visualize_attention", *words, "--layer", "res3.0", "--at", 20, 30)
    assert status == 0 and "res3.0, head 1: the pixel's largest weight is" in text
    assert np.asarray(Image.open(output)).std() > 20
    first = output.read_bytes()
    again = [*words, "--layer", "head.cls.0@p3", "--head", 0]
    assert "exists already; name another one, or give --overwrite" in refused(
        "visualize_attention", *again
    )
    assert output.read_bytes() == first
    status, text = tool("visualize_attention", *again, "--overwrite")
    assert status == 0 and "head 0" in text and "head 1" not in text
    assert output.read_bytes() != first
    assert images_in(output.parent) == ["attention.png"]


def test_mistakes_about_attention(tool, refused, trained, digits, tmp_path):
    image = sorted((digits / "val").glob("*.png"))[0]
    output = tmp_path / "attention.png"

    def error(*words, image=image, weights=trained, output=output):
        words = ["--weights", weights, "--input", image, "--output", output, *words]
        return refused("visualize_attention", *words)

    assert "layer res5.9 does not exist; did you mean res5.0?" in error("--layer", "res5.9")
    assert "no head 11: --head must be 0 to 1 or all; did you mean 1?" in error(
        *("--layer", "res3.0", "--head", 11)
    )
    assert "no head x: --head must be 0 to 1" in error("--layer", "res3.0", "--head", "x")
    assert "the point 64 0 is outside the image" in error("--layer", "res3.0", "--at", 64, 0)
    assert "no.png is not an image file" in error("--layer", "stem", image="no.png")
    assert "no.pth cannot be read" in error("--layer", "stem", weights=tmp_path / "no.pth")
    assert "must end in .png, .pdf, .svg" in error("--layer", "stem", output=tmp_path / "a.txt")
    assert "would replace" in error("--layer", "stem", "--overwrite", output=image)
    assert "--input and --output must be given" in refused(
        "visualize_attention", "--weights", trained, "--layer", "stem"
    )
    assert not any(tmp_path.iterdir())
    assert "the model has no attention layers" in refused(
        "visualize_attention", "--weights", "Digits/retinanet_conv.yaml", "--layer", "list"
    )
    assert "model.onnx was exported, and has no layers by name" in refused(
        "visualize_attention", "--weights", "model.onnx", "--layer", "list"
    )
    status, text = tool("visualize_attention", "--weights", trained, "--layer", "list")
    assert status == 0 and {"stem", "res3.0", "head.bbox.0@p7"} <= set(text.split())


def test_analysis(tool, refused, digits, results, tmp_path):
    output = tmp_path / "analysis"
    data = ["--test", digits / "train.json", digits / "train", "--output", output]
    words = ["--predictions", results, *data, "--num-images", 2]
    status, text = tool("analyze_results", *words)
    assert status == 0 and "AP50 it would give back" in text
    figures = ["classes.png", "confusion.png", "errors.png", "precision_recall.png"]
    assert images_in(output) == [*figures, "results.json", "worst_images.png"]
    for name in figures:
        assert np.asarray(Image.open(output / name)).std() > 10, name
    numbers = json.loads((output / "results.json").read_text())
    assert numbers["metrics"]["AP50"] > 30  # which it has learnt by heart
    objects = len(json.loads((digits / "train.json").read_text())["annotations"])
    assert sum(map(sum, numbers["confusion"]["matrix"][:-1])) == objects
    assert "exists already" in refused("analyze_results", *words)
    assert tool("analyze_results", *words, "--overwrite")[0] == 0
    missing = ["--predictions", tmp_path / "no.json", *data, "--overwrite"]
    assert "no.json cannot be read" in refused("analyze_results", *missing)
    other = ["--test", digits / "val.json", digits / "val", "--output", tmp_path / "other"]
    assert "which is none of" in refused("analyze_results", "--predictions", results, *other)
    assert not (tmp_path / "other").exists()


def test_a_missing_library_is_named(refused, digits, results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    words = ["--predictions", results, "--test", digits / "train.json", digits / "train"]
    error = refused("analyze_results", *words, "--output", tmp_path / "analysis")
    assert "pip install hotcoco" in error and not any(tmp_path.iterdir())


def test_data_as_annotated(tool, refused, digits, tmp_path):
    output = tmp_path / "pictures"
    words = ["--source", "annotation", "--output-dir", output]
    data = ["--train", digits / "train.json", digits / "train"]
    assert tool("visualize_data", *words, *data, "--num-images", 3)[0] == 0
    names = sorted(path.name for path in (digits / "train").iterdir())[:3]
    assert images_in(output) == names
    record = json.loads((digits / "train.json").read_text())
    for name in names:
        image = read_image(str(digits / "train" / name), 10**6)
        drawn = np.asarray(Image.open(output / name))
        assert drawn.shape == (512, 512, 3) and (drawn != enlarged(image)).any()
    assert len(record["images"]) == 8
    broken = tmp_path / "broken"
    shutil.copytree(digits / "train", broken)
    whole = (broken / names[1]).read_bytes()
    (broken / names[1]).write_bytes(whole[: len(whole) // 2])
    shutil.copy(digits / "train.json", tmp_path / "broken.json")
    data_of_broken = ["--train", tmp_path / "broken.json", broken]
    to = ["--source", "annotation", "--output-dir", tmp_path / "others"]
    status, told = tool("visualize_data", *to, *data_of_broken)
    assert status == 0 and len(images_in(tmp_path / "others")) == 7, told
    assert f"Skipped: image {broken}/{names[1]}" in told and "7 pictures written" in told
    assert "exists already" in refused("visualize_data", *words, *data)
    assert "there is no data set to draw" in refused("visualize_data", *words, "--overwrite")
    test = ["--test", digits / "val.json", digits / "val"]
    assert tool("visualize_data", *words, *test, "--overwrite")[0] == 0


def test_data_as_trained_on(tool, refused, digits, tmp_path):
    words = ["--source", "dataloader", "--config-file", "configs/Quick/retinanet_SASA.yaml"]
    words += ["--output-dir", tmp_path / "pictures", "--num-images", 5]
    data = ["--train", digits / "train.json", digits / "train"]
    assert tool("visualize_data", *words, *data, "INPUT.JITTER.CROP_SIZE", 48)[0] == 0
    pictures = [
        Image.open(tmp_path / "pictures" / name) for name in images_in(tmp_path / "pictures")
    ]
    assert len(pictures) == 5 and {picture.size for picture in pictures} == {(528, 528)}
    test = ["--test", digits / "val.json", digits / "val", "--overwrite"]
    assert "give --train, not --test" in refused("visualize_data", *words, *test)
    missing = ["--train", digits / "no.json", digits / "train", "--overwrite"]
    assert "no.json does not exist" in refused("visualize_data", *words, *missing)


def test_results_beside_annotations(tool, refused, digits, results, tmp_path):
    output = tmp_path / "pictures"
    words = ["--input", results, "--output", output]
    data = ["--test", digits / "train.json", digits / "train"]
    assert tool("visualize_json_results", *words, *data, "--conf-threshold", 1)[0] == 0
    names = sorted(path.name for path in (digits / "train").iterdir())
    assert images_in(output) == names
    image = enlarged(read_image(str(digits / "train" / names[0]), 10**6))
    drawn = np.asarray(Image.open(output / names[0]))
    # Nothing is as sure as that, and the annotations are on the right.
    assert np.array_equal(drawn[:, :512], image) and (drawn[:, 512:] != image).any()
    words += [*data, "--conf-threshold", 0.05]
    assert "exists already" in refused("visualize_json_results", *words)
    assert tool("visualize_json_results", *words, "--overwrite")[0] == 0
    assert (np.asarray(Image.open(output / names[0]))[:, :512] != image).any()
    unknown = ["--input", results, "--output", tmp_path / "other", "--dataset", "digits_vall"]
    assert "did you mean digits_val?" in refused("visualize_json_results", *unknown)
    status, text = tool("visualize_json_results", *words[:4], *data, "--conf-threshold", 2)
    assert status == 2 and "must be a number from 0 to 1" in text
