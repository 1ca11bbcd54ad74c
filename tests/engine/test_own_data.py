"""Commands on YOLO and Pascal VOC data sets do what they do on the same data in COCO json."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from sasa_det.config.lazy import load_lazy_config
from sasa_det.config.load import load_config

CONFIG = "configs/Quick/retinanet_SASA.yaml"


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    """The folder of the small data set as a YOLO data set with a VOC folder of its test images."""
    root = tmp_path_factory.mktemp("own")
    names = []
    for split in ("train", "val"):
        content = json.loads((digits / f"{split}.json").read_text())
        names = [category["name"] for category in content["categories"]]
        index = {category["id"]: i for i, category in enumerate(content["categories"])}
        shutil.copytree(digits / split, root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        for image in content["images"]:
            width, height, stem = image["width"], image["height"], image["file_name"][:-4]
            lines, objects = [], []
            for entry in content["annotations"]:
                if entry["image_id"] != image["id"]:
                    continue
                x, y, w, h = entry["bbox"]
                class_index = index[entry["category_id"]]
                fractions = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                lines.append(" ".join(map(str, (class_index, *fractions))))
                corners = zip(
                    ("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True
                )
                bndbox = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
                objects.append(
                    f"<object><name>{names[class_index]}</name><bndbox>{bndbox}</bndbox></object>"
                )
            (root / "labels" / split / f"{stem}.txt").write_text("\n".join(lines))
            if split == "val":
                (root / "voc").mkdir(exist_ok=True)
                shutil.copy(digits / split / image["file_name"], root / "voc")
                xml = f"<annotation>{''.join(objects)}</annotation>"
                (root / "voc" / f"{stem}.xml").write_text(xml)
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    (root / "classes.txt").write_text("\n".join(names))
    return root


@pytest.fixture
def tool(monkeypatch, capfd):
    """Return a function that runs a tool and gives its exit status and what it printed."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(f"tools/{name}.py", run_name="__main__")
        return end.value.code, "".join(capfd.readouterr())

    return call


@pytest.mark.slow
def test_training_and_evaluation_are_those_of_the_same_data_in_coco(
    tool, data, digits, tmp_path, assert_equal_runs, plain_torchscript
):
    options = ["SOLVER.MAX_ITER", 2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "SEED", 3]
    words = {
        "coco": [
            *("--train", digits / "train.json", digits / "train"),
            *("--test", digits / "val.json", digits / "val"),
        ],
        "own": ["--train", data / "data.yaml", "--test", data / "voc"],
    }
    last = {}
    for kind in words:
        flags = ["--config-file", CONFIG, *words[kind], *options, "OUTPUT_DIR", tmp_path / kind]
        status, output = tool("train_net", *flags)
        assert status == 0, output[-2000:]
        last[kind] = json.loads((tmp_path / kind / "metrics.json").read_text().splitlines()[-1])
    assert_equal_runs(tmp_path / "coco", tmp_path / "own")
    metrics = [name for name in last["coco"] if name.startswith("bbox/")]
    assert len(metrics) > 10
    for name in metrics:
        assert last["own"][name] == pytest.approx(last["coco"][name], nan_ok=True), name
    stored = tmp_path / "own" / "inference"
    results = next(stored.rglob("coco_instances_results.json"))
    # The commands that take these results take the data in the same words.
    flags = ["--predictions", results, "--output", tmp_path / "analysis", "--num-images", 1]
    status, output = tool("analyze_results", *flags, "--test", data / "data.yaml")
    assert status == 0, output[-2000:]
    flags = ["--source", "annotation", "--output-dir", tmp_path / "pictures", "--num-images", 1]
    status, output = tool("visualize_data", *flags, "--test", data / "voc")
    assert status == 0, output[-2000:]
    assert [path.suffix for path in (tmp_path / "pictures").iterdir()] == [".png"]
    flags = ["--weights", tmp_path / "own/model_final.pth", "--json", tmp_path / "found.json"]
    flags += ["--test", data / "data.yaml", "--confidence-threshold", 0.0]
    status, output = tool("predict", *flags, "MODEL.DEVICE", "cpu")
    assert status == 0, output[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {result["image_id"] for result in found} == {1, 2, 3}


def test_a_training_on_wrong_labels_is_refused(tool, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    label_file = next((broken / "labels/train").iterdir())
    label_file.write_text("10 .5 .5 .1 .1\n")
    flags = ["--config-file", CONFIG, "--train", broken / "data.yaml"]
    flags += ["OUTPUT_DIR", tmp_path / "run", "DATASETS.TEST", "()"]
    status, output = tool("train_net", *flags)
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2 and error == (
        f"error: {broken}/data.yaml:train: {label_file} line 1 has the class index 10; it must be "
        f"one of 0 to 9, for the names in {broken}/data.yaml"
    )
    assert not (tmp_path / "run").exists()
    status, output = tool("validate_data", "--train", broken / "data.yaml")
    assert status == 1 and f"{label_file} line 1 has the class index 10" in output
    assert "these data are refused" in output
    for words in (["--train", data / "data.yaml"], [data / "voc", "--test"], [data / "data.yaml"]):
        status, output = tool("validate_data", *words)
        assert status == 0 and "these data can be used for" in output, output
    (broken / "data.yaml").write_text("names: [")
    status, output = tool("validate_data", "--train", broken / "data.yaml")
    assert status == 1 and f"error: {broken}/data.yaml, line 1 is not YAML" in output


@pytest.mark.parametrize("source_format", ["yolo", "voc"])
def test_converted_data_are_those_they_were_made_of(tool, data, digits, tmp_path, source_format):
    path = data / "voc" if source_format == "voc" else data / "data.yaml"
    words = ["--from", source_format, "--to", "coco", "--input", path, "--output"]
    words += [tmp_path / "out.json"]
    words += ["--split", "val"] if source_format == "yolo" else []
    status, output = tool("convert_data", *words)
    assert status == 0, output
    expected = json.loads((digits / "val.json").read_text())
    content = json.loads((tmp_path / "out.json").read_text())
    names = {category["id"]: category["name"] for category in expected["categories"]}
    assert [category["name"] for category in content["categories"]] == list(names.values())
    keys = ("file_name", "width", "height")
    assert [[image[key] for key in keys] for image in content["images"]] == [
        [image[key] for key in keys] for image in expected["images"]
    ]
    assert len(content["annotations"]) == len(expected["annotations"])
    for entry, true in zip(content["annotations"], expected["annotations"], strict=True):
        assert entry["bbox"] == pytest.approx(true["bbox"])
        assert entry["iscrowd"] == 0 and "source" not in entry
    # As the last line says.
    status, output = tool("validate_data", tmp_path / "out.json", output.split()[-1])
    assert status == 0, output
    before = (tmp_path / "out.json").read_bytes()
    status, output = tool("convert_data", *words)
    assert status == 2 and "exists already; name another one, or give --overwrite." in output
    status, _ = tool("convert_data", *words, "--overwrite")
    assert status == 0 and (tmp_path / "out.json").read_bytes() == before


def test_what_cannot_be_converted_leaves_no_file(tool, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    shapes = [{"label": "tree", "points": [[1, 2]], "shape_type": "rectangle"}]
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": shapes}))
    output_file = tmp_path / "out" / "coco.json"

    def refused(source_format, path, *words):
        flags = ["--from", source_format, "--input", path, "--output", output_file, *words]
        status, output = tool("convert_data", *flags)
        error = output.splitlines()[-1]
        assert status == 2 and not output_file.parent.exists()
        return error

    assert refused("labelme", tmp_path) == (
        f"error: {tmp_path}:all is not converted: {tmp_path}/a.json shape 1 is a rectangle of 1 "
        "points; it needs 2"
    )
    assert "must be a data.yaml with --from yolo." in refused("yolo", tmp_path)
    assert "must be a folder with --from voc." in refused("voc", tmp_path / "a.json")
    assert "data file none.xml does not exist" in refused("cvat", "none.xml")
    assert f"data file {tmp_path} is a folder, and not a file" in refused("cvat", tmp_path)
    wrong = f"data folder {tmp_path / 'a.json'} is a file, and not a folder"
    assert wrong in refused("labelme", tmp_path / "a.json")
    assert "is not XML" in refused("cvat", tmp_path / "a.json")
    assert "--split is for YOLO and Pascal VOC." in refused("cvat", "none.xml", "--split", "a")
    # The files that are read are not written over.
    flags = ["--from", "labelme", "--input", tmp_path, "--output", tmp_path / "a.json"]
    shapes[0]["points"] *= 2
    text = json.dumps({"imagePath": "a.png", "shapes": shapes})
    (tmp_path / "a.json").write_text(text)
    status, output = tool("convert_data", *flags, "--overwrite")
    assert status == 2 and "which is an input" in output
    assert (tmp_path / "a.json").read_text() == text


def test_a_lazy_config_takes_the_same_words(data, tmp_path):
    config = tmp_path / "lazy.py"
    config.write_text(
        "from detectron2.config import LazyConfig\n"
        f"_FILE = {str(Path('configs/COCO-Detection/retinanet_SASA_R_50_full.py').resolve())!r}\n"
        "_SECTIONS = ('dataloader', 'lr_multiplier', 'model', 'optimizer', 'train')\n"
        "dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(_FILE, _SECTIONS)\n"
    )
    yaml_file, voc = str(data / "data.yaml"), str(data / "voc")
    options = load_lazy_config(str(config), train=[yaml_file], test=[yaml_file, "val"])
    assert (options.train, options.test) == ((f"{yaml_file}:train",), (f"{yaml_file}:val",))
    assert options.num_classes == 10
    cfg = load_config(CONFIG, ["DATASETS.TRAIN_JSON", yaml_file, "DATASETS.TEST_JSON", voc])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((f"{yaml_file}:train",), (f"{voc}:all",))
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 10
