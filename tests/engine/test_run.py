"""Commands as a person gives them: train, resume, evaluate, and every mistake in one sentence."""

import json

import pytest
import torch

from sasa_det.checkpoint.convert import convert_checkpoint
from sasa_det.engine import argument_parser, run
from sasa_det.engine.train import eval_parser, run_eval

CONFIG = "configs/Quick/retinanet_SASA.yaml"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_trains_evaluates_and_resumes(command, words, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command() == 0
    assert (folder / "config.yaml").is_file()
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert "bbox/AP50" in metrics(folder)[-1]

    # The same command again would write over the run.
    assert command() == 2
    assert "OUTPUT_DIR" in capsys.readouterr().err

    # Two more iterations: weights, optimizer and schedule go on where they were.
    assert command("--resume", "SOLVER.MAX_ITER", "6") == 0
    after = torch.load(folder / "model_final.pth", weights_only=False)
    assert after["iteration"] == 5
    states = after["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert {int(state["step"]) for state in states} == {6}

    # Evaluation elsewhere finds what training found.
    weights = ["MODEL.WEIGHTS", folder / "model_final.pth"]
    evaluation = eval_parser().parse_args(words(*weights, "OUTPUT_DIR", tmp_path / "eval"))
    assert run_eval(evaluation) == 0
    found = [
        json.loads(path.read_text())
        for base in (folder, tmp_path / "eval")
        for path in (base / "inference").rglob("coco_instances_results.json")
    ]
    assert len(found) == 2 and found[0] == found[1]

    # --overwrite never removes what it is asked to evaluate or start from.
    assert command("--overwrite", "--eval-only", *weights) == 0
    assert (folder / "model_final.pth").is_file()
    assert command("--overwrite", *weights) == 2
    assert "would be removed by --overwrite" in capsys.readouterr().err
    assert command("--overwrite") == 0
    assert torch.load(folder / "model_final.pth", weights_only=False)["iteration"] == 3


def test_evaluation_without_weights_is_refused(command, capsys):
    assert command("--eval-only") == 2
    assert "--eval-only needs weights" in capsys.readouterr().err


def detections(folder):
    """List what an evaluation found, by the names of the classes."""
    [path] = (folder / "inference").rglob("coco_instances_results.json")
    categories = json.loads((folder / "val.json").read_text())["categories"]
    names = {category["id"]: category["name"] for category in categories}
    found = json.loads(path.read_text())
    return [{**one, "category_id": names[one["category_id"]]} for one in found]


def test_classes_in_another_order_and_other_classes(
    command, digits, tmp_path, capsys, plain_torchscript
):
    """Where a model is evaluated, alone and while it is trained."""
    content = json.loads((digits / "val.json").read_text())
    for category in content["categories"]:
        category["id"] = 20 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 20 - annotation["category_id"]
    folders = [tmp_path / name for name in ("straight", "reversed", "renamed")]
    texts = [(digits / "val.json").read_text(), json.dumps(content)]
    texts.append(texts[0].replace('"name": "4"', '"name": "four"'))
    assert texts[2] != texts[0]
    for folder, text in zip(folders, texts, strict=True):
        folder.mkdir()
        (folder / "val.json").write_text(text)
    straight, other, renamed = ((folder / "val.json", digits / "val") for folder in folders)
    loss = ("TEST.VALIDATION_LOSS", True, "SEED", 1)
    everything = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.001)
    runs = []
    for number, data in enumerate((straight, other)):
        run = tmp_path / f"run_{number}"
        assert command(*loss, "OUTPUT_DIR", run, test=data) == 0
        runs.append({k: v for k, v in metrics(run)[-1].items() if "validation" in k})
    assert runs[0] == pytest.approx(runs[1], rel=1e-6) and runs[0]["validation/total_loss"] > 0
    weights = ("--eval-only", "MODEL.WEIGHTS", tmp_path / "run_0" / "model_final.pth")
    for folder, data in ((folders[0], straight), (folders[1], other)):
        assert command(*weights, *everything, "OUTPUT_DIR", folder, test=data) == 0
    assert "come in another order than those of the weights" in capsys.readouterr().out
    assert detections(folders[0]) == detections(folders[1]) != []
    assert command(*weights, "OUTPUT_DIR", folders[2], test=renamed) == 2
    error = capsys.readouterr().err
    assert "1: four in the first alone and 1: 4 in the second alone" in error
    assert not (folders[2] / "config.yaml").exists()
    # A converted file carries the classes along.
    convert_checkpoint(weights[2], tmp_path / "whole.pth", whole=True)
    weights = (*weights[:2], tmp_path / "whole.pth")
    assert command(*weights, "OUTPUT_DIR", folders[2], test=renamed) == 2
    assert "1: four in the first alone" in capsys.readouterr().err


@pytest.mark.slow
def test_learns_to_detect(trained):
    """Eight images learned by heart: the loss falls by half and the boxes are found."""
    records = metrics(trained.parent)
    losses = [record["total_loss"] for record in records if "total_loss" in record]
    assert losses[-1] < losses[0] / 2
    assert records[-1]["bbox/AP50"] > 50


MISTAKES = {
    "command": (["SOLVER.MAX_ITER", "4", "--resume"], "flags come before the KEY VALUE pairs"),
    "key": (
        ["MODEL.SASA.KERNEL_SISE", "7"],
        "config key MODEL.SASA.KERNEL_SISE does not exist; did you mean MODEL.SASA.KERNEL_SIZE?",
    ),
    "value": (["SOLVER.BASE_LR", "-1.0"], "SOLVER.BASE_LR must be above 0, got -1.0"),
    "schedule": (["SOLVER.WARMUP_ITERS", "9"], "SOLVER.WARMUP_ITERS must be below SOLVER.MAX_ITER"),
    "model": (["MODEL.SASA.KERNEL_SIZE", "4"], "MODEL.SASA.KERNEL_SIZE must be odd"),
    "name": (["MODEL.BACKBONE.NAME", "build_sasa_resnet"], "did you mean build_sasa_resnet_back"),
    "classes": (["MODEL.RETINANET.NUM_CLASSES", "3"], "MODEL.RETINANET.NUM_CLASSES is 3"),
    "weights": (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS nowhere.pth does not exist"),
    "processes": (
        ["--num-gpus", "3"],
        "SOLVER.IMS_PER_BATCH must be a multiple of the number of",
    ),
    "machines": (["--num-machines", "2"], "--dist-url must be an address that all machines reach"),
    "address": (["--num-gpus", "2", "--dist-url", "host"], "--dist-url must be auto, tcp://host"),
    "gpu": (["MODEL.DEVICE", "cuda:99"], "MODEL.DEVICE is cuda:99 but"),
    "nothing to resume": (["--resume"], "holds no checkpoint to resume"),
    "both": (["--resume", "auto", "--overwrite"], "--resume and --overwrite exclude each other"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_config_are_told_before_any_work(mistake, command, tmp_path, capsys):
    words, message = MISTAKES[mistake]
    assert command(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_data_are_told_before_any_work(command, digits, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    content = json.loads((digits / "train.json").read_text())
    images = digits / "train"
    first = content["images"][0]

    def told(*parts):
        assert command(train=(bad, images)) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        for part in (str(bad), *parts):
            assert part in error
        assert not (tmp_path / "run").exists()
        bad.write_text("gone")

    bad.write_text("{")
    told("JSON")
    bad.write_text("[]")
    told()
    for key in ("images", "annotations", "categories"):
        bad.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        told(key)
    bad.write_text(json.dumps({**content, "images": []}))
    told("images")
    bad.write_text(json.dumps({**content, "annotations": []}))
    told("annotations")
    missing = [{**first, "file_name": "nowhere.png"}, *content["images"][1:]]
    bad.write_text(json.dumps({**content, "images": missing}))
    told("nowhere.png")
    bad.unlink()
    assert command(train=(bad, images)) == 2
    assert str(bad) in capsys.readouterr().err
    bad.write_text(json.dumps(content))
    assert command(train=(bad, tmp_path / "no_folder")) == 2
    assert "no_folder" in capsys.readouterr().err


def test_number_of_classes_follows_the_data(command, digits, tmp_path):
    content = json.loads((digits / "train.json").read_text())
    content["categories"] = [{"id": 4, "name": "digit"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 4
    one_class = tmp_path / "one_class.json"
    one_class.write_text(json.dumps(content))
    data = (one_class, digits / "train")
    assert command("SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0", train=data, test=data) == 0
    weights = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)["model"]
    assert weights["head.cls_score.1.bias"].shape == (9,)


def test_unknown_data_set_and_config_file(capsys, tmp_path):
    parser = argument_parser()
    words = ["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path / "run")]
    assert run(parser.parse_args([*words, "DATASETS.TRAIN", "('digits_trian',)"])) == 2
    error = capsys.readouterr().err
    assert "digits_trian" in error and "digits_train" in error
    assert run(parser.parse_args(["--config-file", "nowhere.yaml"])) == 2
    assert "config file nowhere.yaml does not exist" in capsys.readouterr().err
