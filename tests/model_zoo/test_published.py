"""The weights that are part of the package: what they find, and what is refused."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det import model_zoo
from sasa_det.checkpoint import Checkpointer, read_checkpoint
from sasa_det.config.defaults import default_config
from sasa_det.config.load import load_config
from sasa_det.data import write_digits
from sasa_det.engine import Predictor, UsageError
from sasa_det.engine.predict import predict_parser, run_predict
from sasa_det.engine.trained_model import load_trained_model
from sasa_det.errors import CheckpointError
from sasa_det.model_zoo.checkpoints import CHECKPOINTS, Weights

NAME = "Digits/retinanet_SASA.yaml"
KEY = NAME.removesuffix(".yaml")
FOLDER = Path(model_zoo.__file__).parent / "weights" / KEY


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first images of ``digits_val``, which do not depend on how many there are."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits", num_train=1, num_val=50)


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_checkpoint(NAME)


def test_detectron2s_predictor_finds_the_same(predictor):
    """With the code of the documentation."""
    blocks = Path("docs/model_zoo.md").read_text().split("```python\n")[1:]
    names = {}
    for block in blocks:
        exec(block.partition("```")[0], names)
    for path in model_zoo.get_sample_images(NAME):
        found = names["predictor"](read_image(path, "BGR"))["instances"]
        (expected,) = predictor([path])
        assert len(expected) > 0 and len(found) == len(expected)
        boxes = found.pred_boxes.tensor, expected.pred_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "name, expected",
    [
        (NAME, [82.75, 97.80, 97.33]),
        ("Digits/retinanet_SASA_conv_stem.yaml", [84.57, 97.68, 97.68]),
        ("Digits/retinanet_conv.yaml", [83.82, 97.59, 96.97]),
    ],
)
def test_the_ap_is_that_of_the_training(name, expected, predictor, digits):
    predictor = predictor if name == NAME else Predictor.from_checkpoint(name)
    truth = COCO(digits / "val.json")
    results = []
    images = truth.loadImgs(truth.getImgIds())
    paths = [digits / "val" / image["file_name"] for image in images]
    for image, instances in zip(images, predictor(paths), strict=True):
        boxes = instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        results += [
            {
                "image_id": image["id"],
                "category_id": predictor.trained.category_id(index),
                "bbox": box,
                "score": score,
            }
            for box, score, index in zip(
                boxes.tolist(),
                instances.scores.tolist(),
                instances.pred_classes.tolist(),
                strict=True,
            )
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # Of these images in the coco_instances_results.json of the trainings' last evaluations, whose
    # AP of all 200 images are 82.17, 83.91 and 83.47.
    assert len(images) == 50
    assert evaluation.stats[:3] * 100 == pytest.approx(expected, abs=0.05)


def test_the_sample_images_are_of_the_validation_data_and_their_digits_are_found(
    predictor, digits, tmp_path
):
    samples = model_zoo.get_sample_images(NAME)
    assert len(samples) == 2
    words = ["--weights", NAME, "--output", tmp_path / "found", "--json", tmp_path / "found.json"]
    args = predict_parser().parse_args([*map(str, words), "MODEL.DEVICE", "cpu"])
    assert run_predict(args) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    truth = json.loads((digits / "val.json").read_text())
    for sample in map(Path, samples):
        assert sample.read_bytes() == (digits / "val" / sample.name).read_bytes()
        assert (tmp_path / "found" / sample.name).stat().st_size > sample.stat().st_size / 2
        expected = [
            a["category_id"] for a in truth["annotations"] if a["image_id"] == int(sample.stem)
        ]
        classes = [r["category_id"] for r in found if r["file_name"] == sample.name]
        assert sorted(classes) == sorted(expected)


def test_the_model_is_the_same_in_the_zoo_and_in_commands(predictor):
    model = model_zoo.get(NAME, trained=True, device="cpu")
    loaded = predictor.trained.model.state_dict()
    weights = model.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name].cpu(), weight) for name, weight in weights.items())
    assert predictor.trained.class_names == [str(digit) for digit in range(10)]


def test_a_training_starts_from_weights_by_their_name(predictor):
    options = ["MODEL.WEIGHTS", NAME, "MODEL.DEVICE", "cpu"]
    cfg = load_config(f"configs/{NAME}", options)
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    loaded = predictor.trained.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded[name].cpu()), name
    with pytest.raises(UsageError, match="no trained weights of Quick/retinanet_SASA.yaml"):
        Checkpointer(model).load("Quick/retinanet_SASA.yaml")


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_the_file_has_weights_config_and_classes_and_nothing_of_a_machine(key):
    folder = FOLDER.parents[1] / key
    file = folder / "model.safetensors"
    checkpoint = read_checkpoint(file)
    assert checkpoint.keys() == {
        *("model", "config", "config_digest", "classes", "category_ids", "preprocessing")
    }
    assert file.stat().st_size < 1e7
    config = (folder / "config.yaml").read_text()
    assert checkpoint["config"] == config
    trained, named = yaml.safe_load(config)["MODEL"], load_config(f"{key}.yaml").MODEL
    default = default_config().MODEL
    # The model of the config of this name, wherever it was trained. Keys that have been added since
    # have their defaults.
    for part in ("SASA", "RETINANET"):
        expected = {**yaml.safe_load(default[part].dump()), **trained[part]}
        assert expected == yaml.safe_load(named[part].dump())
    for text in (config, (folder / "log.txt").read_text()):
        assert not any(f"{start}/work" in text for start in " @'")


def test_a_flipped_byte_is_refused(monkeypatch, tmp_path):
    content = bytearray((FOLDER / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(content)
    entry = Weights(str(copy), CHECKPOINTS[KEY].sha256)
    monkeypatch.setitem(CHECKPOINTS, KEY, entry)
    for load in (load_trained_model, lambda name: model_zoo.get(name, trained=True, device="cpu")):
        with pytest.raises(CheckpointError, match=f"{copy} has the SHA-256 .*, not {entry.sha256}"):
            load(NAME)


def test_names_without_weights(tmp_path):
    known = ", ".join(f"{key}.yaml" for key in CHECKPOINTS)
    for name in ("Digits/classifier_conv.yaml", "COCO-Detection/retinanet_R_50.py"):
        with pytest.raises(UsageError) as error:
            load_trained_model(name)
        assert str(error.value) == (
            f"there are no trained weights of {name} in sasa_det.model_zoo; it has those of these "
            f"configs: {known}."
        )
    words = ["--weights", "model.pth", "--output", str(tmp_path / "found")]
    with pytest.raises(UsageError, match="give images with --input"):
        run_predict(predict_parser().parse_args(words))
