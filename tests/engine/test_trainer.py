"""What a run does beside steps, and what becomes of it when something goes wrong."""

import gc
import json
import multiprocessing
import os
import pickle
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from sasa_det.checkpoint import read_checkpoint
from sasa_det.checkpoint.convert import convert_checkpoint
from sasa_det.engine.hooks import BestMetric

FROZEN = [
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
    "MODEL.RETINANET.NORM", "FrozenBN",
]  # fmt: skip


def metrics(folder):
    """Map iterations to the metrics that were written of them."""
    found = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["iteration"], {}).update(record)
    return found


def checkpoints(folder):
    return sorted(path.stem.removeprefix("model_") for path in folder.glob("model_*.pth"))


def test_averages_validation_losses_best_weights_and_a_cap(command, tmp_path):
    folder = tmp_path / "run"
    options = {
        "SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_CHECKPOINTS": 2,
        "SOLVER.BASE_LR": 0.02, "TEST.EVAL_PERIOD": 2, "MODEL.EMA.DECAY": 0.5,
        "TEST.VALIDATION_LOSS": True, "TEST.BEST_METRIC": "validation/total_loss",
        "TEST.BEST_MODE": "min",
    }  # fmt: skip
    assert command(*(word for pair in options.items() for word in pair)) == 0
    assert checkpoints(folder) == ["0000004", "0000005", "best", "final"]
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    written = metrics(folder)
    losses = {i: r["validation/total_loss"] for i, r in written.items() if "bbox/AP" in r}
    assert all("ema/bbox/AP" in written[i] for i in losses)
    # Metrics are written every 20 iterations and at the end.
    assert list(losses) == [5]
    best = read_checkpoint(folder / "model_best.pth")
    kept = best["trainer"]["hooks"]["Evaluation"]
    assert best["iteration"] in (1, 3, 5) and kept["evaluated"] == best["iteration"] + 1
    assert kept["best"]["value"] <= losses[5]
    state = read_checkpoint(folder / "model_final.pth")
    averages = state["ema"]["weights"]
    trained = {k: v for k, v in state["model"].items() if k in averages}
    assert trained.keys() == averages.keys() and len(trained) > 100
    assert any((trained[k] != averages[k]).any() for k in trained)


def test_averages_are_what_is_evaluated_as_such(command, tmp_path):
    """Detections of ema/ are those of a model that holds the averages, and of no other."""
    options = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "SEED", 1]
    assert command("MODEL.EMA.DECAY", 0.5, "SOLVER.BASE_LR", 0.02, *options) == 0

    def detections(folder):
        (found,) = folder.glob("*/coco_instances_results.json")
        return json.loads(found.read_text())

    inference = tmp_path / "run" / "inference"
    found = {"raw": detections(inference), "ema": detections(inference / "ema")}
    assert len(found["raw"]) == 300 and found["raw"] != found["ema"]
    for weights in found:
        source, alone = tmp_path / "run" / "model_final.pth", tmp_path / f"{weights}.pth"
        convert_checkpoint(source, alone, whole=True, weights=weights)
        folder = tmp_path / weights
        words = ["--eval-only", "MODEL.WEIGHTS", alone, *options, "OUTPUT_DIR", folder]
        assert command(*words) == 0
        assert detections(folder / "inference") == found[weights]


def test_stops_where_nothing_becomes_better(command, tmp_path, capsys):
    options = [
        *FROZEN, "SOLVER.BASE_LR", 1e-30, "SOLVER.MAX_ITER", 50, "SOLVER.CHECKPOINT_PERIOD", 100,
        "TEST.EVAL_PERIOD", 1, "TEST.VALIDATION_LOSS", True, "TEST.EARLY_STOPPING", 2,
        "TEST.BEST_METRIC", "validation/loss_cls", "TEST.BEST_MODE", "min",
    ]  # fmt: skip
    assert command(*options) == 0
    assert "has not become better than" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == ["0000002", "best"]
    # It is not better for being asked again.
    assert command("--resume", *options) == 0
    assert "has not become better than" in capsys.readouterr().out
    assert checkpoints(tmp_path / "run") == ["0000002", "best"]


def test_best_of_a_metric():
    best = BestMetric("bbox/AP", "max", patience=2)
    values = [float("nan"), 1.0, 1.0, 2.0, 1.5]
    assert [best.update({"bbox/AP": value}) for value in values] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert best.value == 2.0 and not best.is_exhausted
    assert not best.update({"bbox/AP": 2.0}) and best.is_exhausted
    # As before anything is detected.
    assert not best.update({"bbox/AP50": 3.0}) and (best.value, best.since) == (2.0, 3)
    again = BestMetric("bbox/AP", "max")
    again.load_state_dict(best.state_dict())
    assert (again.value, again.since) == (2.0, 3)
    # A value of another metric is no value of this one.
    for other in (BestMetric("bbox/AP50", "max"), BestMetric("bbox/AP", "min")):
        other.load_state_dict(best.state_dict())
        assert (other.value, other.since) == (None, 0)


def test_a_metric_that_nothing_detected_leaves_out_is_no_better(command, tmp_path, capsys):
    """AP is NaN then, and the APs of classes are missing."""
    options = [
        "MODEL.RETINANET.SCORE_THRESH_TEST", 1.0, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 1,
        "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.BEST_METRIC", "bbox/AP-7",
    ]  # fmt: skip
    assert command(*options, "OUTPUT_DIR", tmp_path / "whole") == 0
    assert checkpoints(tmp_path / "whole") == ["final"]
    options += ["TEST.EARLY_STOPPING", 2]
    for words in ([], ["--resume"]):
        assert command(*words, *options) == 0
        printed = capsys.readouterr().out
        assert "bbox/AP-7 has had no finite value in 2 evaluations" in printed
        assert checkpoints(tmp_path / "run") == ["0000001"]


def test_a_loss_that_the_model_does_not_have(command, tmp_path, capsys):
    options = ["TEST.VALIDATION_LOSS", True, "TEST.BEST_METRIC", "validation/loss_clss"]
    assert command(*options) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "error: TEST.BEST_METRIC must be one of the losses validation/loss_cls, "
        "validation/loss_box_reg, validation/total_loss, got validation/loss_clss; did you mean "
        "validation/loss_cls?"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_saves_nothing_and_names_the_images(command, tmp_path, capsys):
    """The second step has no finite loss; weights beyond float32 are not saved either."""
    folder = tmp_path / "run"
    wild = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e25, "SOLVER.WARMUP_ITERS", 0, *FROZEN]
    assert command(*wild, "SOLVER.CHECKPOINT_PERIOD", 100) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: iteration 1: ") and "is nan" in error
    assert "images of the batch: " in error and error.count(".png (id ") == 2
    assert checkpoints(folder) == [] and not (folder / "last_checkpoint").exists()


def test_a_resumed_run_has_the_new_rate(command, tmp_path, capsys):
    constant = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 0]
    assert command(*constant, "SOLVER.BASE_LR", 0.01) == 0
    changed = ["SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", 5]
    assert command("--resume", *constant, *changed) == 0
    assert metrics(tmp_path / "run")[4]["lr"] == pytest.approx(0.001)
    assert "SOLVER.BASE_LR, from 0.01 to 0.001" in capsys.readouterr().out
    state = read_checkpoint(tmp_path / "run" / "model_final.pth")
    groups = state["trainer"]["_trainer"]["optimizer"]["param_groups"]
    # Queries and keys have SOLVER.LOGIT_LR_FACTOR of it.
    assert {round(group["initial_lr"], 9) for group in groups} == {0.001, 0.00005}


def test_rates_follow_the_batch_and_lengths_the_epochs(command, tmp_path, capsys):
    options = {
        "SOLVER.REFERENCE_BATCH": 8, "SOLVER.BASE_LR": 0.008, "SOLVER.MAX_EPOCHS": 0.5,
        "SOLVER.WARMUP_EPOCHS": 0.25, "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    }  # fmt: skip
    assert command(*(word for pair in options.items() for word in pair)) == 0
    printed = capsys.readouterr().out
    assert "SOLVER.BASE_LR: 0.002 for a batch of 2, scaled from 0.008 for 8" in printed
    assert "SOLVER.MAX_ITER: 2, which is 0.5 epochs of 8 images" in printed
    assert metrics(tmp_path / "run")[1]["lr"] == pytest.approx(0.002)
    assert read_checkpoint(tmp_path / "run" / "model_final.pth")["iteration"] == 1


def test_a_mistake_that_is_found_late_leaves_no_run(command, tmp_path, capsys):
    """That so short a run has no room for its warmup is known with the number of images."""
    for _ in range(2):
        assert command("SOLVER.MAX_EPOCHS", 0.001) == 2
        assert "SOLVER.WARMUP_ITERS must be below SOLVER.MAX_ITER" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert command("SOLVER.MAX_EPOCHS", 1.0) == 0


def test_training_data_that_changed_in_their_place(command, digits, tmp_path, capsys):
    data, test = ((tmp_path / f"{name}.json", digits / name) for name in ("train", "val"))
    contents = [json.loads((digits / path.name).read_text()) for path, _ in (data, test)]

    def resume(*words):
        for (path, _), content in zip((data, test), contents, strict=True):
            path.write_text(json.dumps(content))
            # Data sets are read once in a process: another one finds what is there now.
            if str(path) in DatasetCatalog:
                DatasetCatalog.remove(str(path))
                MetadataCatalog.remove(str(path))
        status = command(*words, "SOLVER.MAX_ITER", 6, train=data, test=test)
        return status, capsys.readouterr().err

    assert resume()[0] == 0
    contents[0]["annotations"][0]["bbox"][0] += 1
    status, error = resume("--resume")
    assert status == 2 and "training data are not those that the checkpoint was" in error
    contents[0]["annotations"][0]["bbox"][0] -= 1
    for content in contents:
        content["categories"][3]["name"] = "drei"
    status, error = resume("--resume")
    assert status == 2 and "the classes of the training data are 0, 1, 2, drei, 4" in error


def test_damaged_newest_checkpoint(command, tmp_path, capsys):
    folder = tmp_path / "run"
    assert command("SOLVER.CHECKPOINT_PERIOD", 1) == 0
    for name in ("model_final.pth", "model_0000003.pth"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    (folder / "metrics.json").write_text((folder / "metrics.json").read_text() + '{"iterat')
    assert command("--resume", "SOLVER.MAX_ITER", 5) == 0
    printed = capsys.readouterr().out
    assert "model_0000002.pth instead" in printed
    assert "Starting training from iteration 3" in printed
    # What was written of iteration 3 before is written once, and the torn line is gone.
    lines = (folder / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [4]
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 4


LIMITED = """
import resource, runpy, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
runpy.run_path("tools/train_net.py", run_name="__main__")
"""


@pytest.mark.slow
def test_full_disk(command, start, tmp_path):
    folder = tmp_path / "run"
    assert command() == 0
    before = {path.name for path in folder.iterdir()}
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    process = start("--resume", "SOLVER.MAX_ITER", 8, tool=script)
    output = process.communicate()[0]
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and "model_0000005.pth" in last
    left = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    assert left == {name for name in before if not name.startswith("events.")}
    assert command("--resume", "SOLVER.MAX_ITER", 8) == 0
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 7


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("use", ["train", "evaluate", "resume", "last_checkpoint"])
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_hostile_weights_execute_nothing(use, suffix, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    content = {"model": {"w": Hostile(marker)}, "iteration": 1, "__author__": "x"}
    folder = tmp_path / "run"
    folder.mkdir()
    resumed = use in ("resume", "last_checkpoint")
    name = f"model_0000001.{suffix}" if resumed else f"evil.{suffix}"
    path = folder / name if resumed else tmp_path / name
    if suffix == "pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    if resumed:
        (folder / "model_0000001.pth").touch()
        (folder / "last_checkpoint").write_text(name)
        flags = ["--resume"] if use == "resume" else ["--eval-only", "--resume"]
        assert command(*flags) == 2
    else:
        flags = ["--eval-only"] if use == "evaluate" else []
        assert command(*flags, "MODEL.WEIGHTS", path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and name in error
    assert not marker.exists()


@pytest.mark.parametrize("skipped", [0, 1])
def test_unreadable_image(skipped, command, digits, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for path in (digits / "train").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    broken = sorted(images.iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    # Data sets are known by their json's path.
    data = (tmp_path / "train.json", images)
    data[0].write_bytes((digits / "train.json").read_bytes())
    # With this seed it is in the third batch.
    options = ["SEED", 1, "SOLVER.CHECKPOINT_PERIOD", 100, "DATALOADER.SKIP_UNREADABLE", skipped]
    status = command(*options, train=data)
    printed = capsys.readouterr()
    if skipped:
        assert status == 0 and printed.out.count(f"Skipped: image {broken}") == 1
    else:
        assert status == 1
        assert f"error: image {broken} cannot be read" in printed.err
        # The steps before are not lost.
        assert checkpoints(tmp_path / "run") == ["0000001"]
        assert read_checkpoint(tmp_path / "run" / "model_0000001.pth")["iteration"] == 1


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_unreadable_image_in_an_evaluation(
    command, digits, tmp_path, capsys, plain_torchscript, assert_equal_runs
):
    """The steps before it are saved as what they are, and the run goes on from them."""
    images, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(digits / "val", images)
    data = (tmp_path / "val.json", images)
    shutil.copyfile(digits / "val.json", data[0])
    options = ["SEED", 3, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 3]
    assert command(*options, "OUTPUT_DIR", tmp_path / "unbroken", test=data) == 0
    broken = sorted(images.iterdir())[1]
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    assert command(*options, test=data) == 1
    assert f"error: image {broken} cannot be read" in capsys.readouterr().err
    assert checkpoints(folder) == ["0000002"]
    state = read_checkpoint(folder / "model_0000002.pth")
    assert state["iteration"] == 2
    steps = state["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert {int(step["step"]) for step in steps} == {3}
    broken.write_bytes(content)
    assert command("--resume", *options, test=data) == 0
    assert_equal_runs(tmp_path / "unbroken", folder)
    # One line has the losses of the step and the evaluation that came after the resumption.
    assert [line["iteration"] for line in lines(folder)] == [2, 3]
    assert {"total_loss", "bbox/AP"} <= lines(folder)[0].keys()


def test_statistics_of_batch_norms_after_a_resumption(
    command, tmp_path, plain_torchscript, assert_equal_runs
):
    """They are averaged over the same images as those of an unbroken run."""
    options = [
        "SEED", 3, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1,
        "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2,
    ]  # fmt: skip
    folders = [tmp_path / name for name in ("unbroken", "resumed")]
    for folder in folders:
        assert command(*options, "OUTPUT_DIR", folder) == 0
    for name in ("model_final.pth", "model_0000003.pth", "model_0000002.pth"):
        (folders[1] / name).unlink()
    (folders[1] / "last_checkpoint").write_text("model_0000001.pth")
    assert command("--resume", *options, "OUTPUT_DIR", folders[1]) == 0
    assert_equal_runs(*folders)
    one, other = (read_checkpoint(folders[0] / f"model_000000{i}.pth")["model"] for i in (2, 3))
    means = [name for name in one if name.endswith("running_mean")]
    assert means and all((one[name] != other[name]).any() for name in means)


def test_a_finished_run_does_not_evaluate_again(command, capsys):
    for flags, evaluations in (([], 1), (["--resume"], 0), (["--resume"], 0)):
        assert command(*flags) == 0
        assert capsys.readouterr().out.count("Start inference") == evaluations


def test_lower_precision_and_recomputed_stages(command, tmp_path):
    options = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "MODEL.CHANNELS_LAST",
               True, "MODEL.ACTIVATION_CHECKPOINTING", "['res2','res4']",
               "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
               "full_model"]  # fmt: skip
    assert command(*options) == 0
    weights = read_checkpoint(tmp_path / "run" / "model_final.pth")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_processes_that_read_the_data_end_with_the_training(command, end):
    options = ["SOLVER.BASE_LR", 1e30] if end == "failed" else []
    # Whenever the garbage collector comes, which would wait for them.
    gc.disable()
    try:
        assert command("DATALOADER.NUM_WORKERS", 1, *options) == (end == "failed")
        assert not multiprocessing.active_children()
    finally:
        gc.enable()
