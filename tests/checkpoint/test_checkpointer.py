import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from sasa_det.checkpoint import Checkpointer, CheckpointError, read_checkpoint
from sasa_det.checkpoint.writing import write_checkpoint


class Trainer:
    def __init__(self, state=0):
        self.state = state

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state_dict):
        self.state = state_dict["state"]


def model_of(value):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, float(value))
    torch.nn.init.constant_(model.bias, float(value))
    return model


def save(folder, name, iteration, **options):
    run = Checkpointer(model_of(iteration), str(folder), trainer=Trainer(iteration))
    run.save(name, iteration=iteration, **options)
    return Path(folder, f"{name}.pth")


def resume(folder):
    """Resume and return the iteration, after checking that all state is of it."""
    run = Checkpointer(model_of(-1), str(folder), trainer=Trainer(-1))
    iteration = run.resume_or_load("", resume=True)["iteration"]
    assert run.checkpointables["trainer"].state == iteration
    assert (run.model.weight == iteration).all() and (run.model.bias == iteration).all()
    return iteration


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path):
    """A folder with three checkpoints, whose file times say nothing."""
    folder = tmp_path / "run"
    for name, iteration in (("model_0000009", 9), ("model_0000019", 19), ("model_final", 29)):
        path = save(folder, name, iteration)
        os.utime(path, (100 - iteration, 100 - iteration))
    return folder


# ----------------------------------------------------------------------------------------- saving


def test_a_save_holds_all_and_is_tagged(tmp_path):
    run = Checkpointer(model_of(3), str(tmp_path / "run"), trainer=Trainer(4))
    run.save("model_0000003", iteration=3, config="text")
    read = read_checkpoint(tmp_path / "run" / "model_0000003.pth")
    assert list(read) == ["model", "trainer", "iteration", "config"]
    assert (read["trainer"], read["iteration"], read["config"]) == ({"state": 4}, 3, "text")
    assert torch.equal(read["model"]["weight"], run.model.weight)
    assert run.has_checkpoint()
    assert run.get_checkpoint_file() == str(tmp_path / "run" / "model_0000003.pth")
    run.save("model_best", tag=False, iteration=3)
    assert run.get_checkpoint_file() == str(tmp_path / "run" / "model_0000003.pth")


def test_detectron2_reads_what_is_saved(tmp_path):
    save(tmp_path, "model_final", 5)
    theirs = DetectionCheckpointer(model_of(0), str(tmp_path), trainer=Trainer())
    assert theirs.resume_or_load("", resume=True)["iteration"] == 5
    assert (theirs.model.weight == 5).all() and theirs.checkpointables["trainer"].state == 5


def test_what_detectron2_saved_is_resumed(tmp_path):
    theirs = DetectionCheckpointer(model_of(5), str(tmp_path), trainer=Trainer(5))
    theirs.save("model_final", iteration=5)
    assert resume(tmp_path) == 5


@pytest.mark.parametrize("options", [{"save_to_disk": False}, {"save_dir": ""}])
def test_other_processes_save_nothing(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    run = Checkpointer(model_of(3), **{"save_dir": str(tmp_path), **options})
    run.save("model_final", iteration=3)
    run.remove_old("model_", 1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(run, value):
    model = model_of(1)
    model.bias.data[1] = value
    with pytest.raises(CheckpointError, match="model_final.pth is not saved: the weight bias is"):
        Checkpointer(model, str(run)).save("model_final", iteration=99)
    assert resume(run) == 29


def test_averages_and_momenta_that_are_not_finite_are_neither_saved_nor_resumed(run, caplog):
    """They would become weights at the end, or with the next step."""
    bad = {"averages": {"bias": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(
        CheckpointError,
        match="model_0000039.pth is not saved: the state of trainer, at state/averages/bias",
    ):
        Checkpointer(model_of(39), str(run), trainer=Trainer(bad)).save("model_0000039")
    content = read_checkpoint(run / "model_final.pth")
    write_checkpoint({**content, "trainer": {"state": bad}}, run / "model_final.pth")
    assert resume(run) == 19
    assert "the state of trainer, at state/averages/bias is not finite" in caplog.text


@pytest.mark.parametrize("name", ["../model", "a/b", "/model", "model/"])
def test_a_name_that_is_no_bare_one(tmp_path, name):
    with pytest.raises(CheckpointError, match="must not contain a folder"):
        Checkpointer(model_of(1), str(tmp_path / "run")).save(name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model_0000039", "model_final"])
def test_a_save_that_the_disk_refuses_loses_nothing(run, name):
    before = sorted(os.listdir(run))
    large = Checkpointer(torch.nn.Linear(1000, 100), str(run), trainer=Trainer())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"{name}.pth could not be written"):
            large.save(name, iteration=39)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(run)) == before
    assert resume(run) == 29


def test_a_tag_that_the_disk_refuses_loses_nothing(run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="last_checkpoint could not be written"):
            Checkpointer(model_of(1), str(run)).tag_last_checkpoint("model_0000009.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resume(run) == 29


@pytest.mark.slow
def test_kills_in_saves_lose_nothing(tmp_path):
    script = Path(__file__).with_name("kill_in_save.py")
    num_kills = 25
    output = subprocess.check_output(
        [sys.executable, script, tmp_path / "run", str(num_kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # Kills came within saves and left parts of files.
    assert all(int(number) > num_kills / 4 for number in output.split())


# --------------------------------------------------------------------------------------- resuming


def test_the_last_checkpoint_is_resumed(run, caplog):
    assert resume(run) == 29
    (run / "last_checkpoint").write_text("model_0000009.pth\n")
    assert resume(run) == 9
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


FAULTS = {
    "missing": lambda run: (run / "last_checkpoint").unlink(),
    "empty": lambda run: (run / "last_checkpoint").write_text(""),
    "binary": lambda run: (run / "last_checkpoint").write_bytes(b"\xff\0\n"),
    "stale": lambda run: (run / "last_checkpoint").write_text("model_0000039.pth"),
    "a folder": lambda run: (run / "last_checkpoint").write_text("."),
    "absolute": lambda run: (run / "last_checkpoint").write_text("/etc/passwd"),
    "long": lambda run: (run / "last_checkpoint").write_text("x" * 5000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_last_checkpoint_that_names_no_file(run, fault, caplog):
    FAULTS[fault](run)
    assert resume(run) == 29
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "last_checkpoint" in warning.getMessage()
    assert "Resuming from" in warning.getMessage() and "model_final.pth" in warning.getMessage()


# The last is of a file in the folder, but no bare name.
NAMES_OF_OTHERS = ["../outside.pth", "a/../../outside.pth", "link.pth", "{}", "./model_0000009.pth"]


@pytest.mark.parametrize("name", NAMES_OF_OTHERS)
def test_last_checkpoint_leads_nowhere_else(run, tmp_path, hostile, name):
    outside = save(tmp_path, "outside", 99)
    (run / "link.pth").symlink_to(outside)
    (run / "model_link.pth").symlink_to(outside)
    (run / "a").mkdir()
    (run / "last_checkpoint").write_text(name.format(outside))
    assert resume(run) == 29
    torch.save(hostile, outside)
    assert resume(run) == 29


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.pth", "detectron2://a.pkl"])
def test_last_checkpoint_is_no_address(run, address):
    (run / "last_checkpoint").write_text(address)
    assert resume(run) == 29


def test_a_link_within_the_folder_is_followed(run):
    (run / "last_checkpoint").write_text("link.pth")
    (run / "link.pth").symlink_to("model_0000009.pth")
    assert resume(run) == 9


def test_damaged_files_are_passed_over_by_iteration(run, caplog):
    damage(run / "model_final.pth")
    assert resume(run) == 19
    assert "model_final.pth cannot be used: its content does not match its checksum" in caplog.text
    (run / "model_0000019.pth").write_bytes((run / "model_0000019.pth").read_bytes()[:1000])
    assert resume(run) == 9
    (run / "model_0000009.pth").rename(run / "model_9999999.pth")
    save(run, "model_0000000", 12)
    damage(save(run, "model_0000001", 13))
    assert resume(run) == 12


def test_the_newest_is_by_iteration_not_by_name(run):
    (run / "last_checkpoint").unlink()
    (run / "model_0000009.pth").rename(run / "model_zzz.pth")
    assert resume(run) == 29


def test_what_is_no_training_state_is_passed_over(run, hostile, caplog):
    torch.save(hostile, run / "model_0000100.pth")
    (run / "model_0000101.pth").write_bytes(b"")
    (run / "model_0000102.pth").mkdir()
    Checkpointer(model_of(1), str(run)).save("model_0000103")  # weights alone, tagged
    assert resume(run) == 29
    assert "model_0000103.pth holds no training state" in caplog.text
    # Without the state of the trainer, and with weights that are no numbers.
    Checkpointer(model_of(1), str(run)).save("model_0000104", iteration=104)
    model = model_of(1).state_dict()
    model["bias"][0] = float("nan")
    state = {"model": model, "trainer": {"state": 105}, "iteration": 105}
    torch.save(state, run / "model_0000105.pth")
    assert resume(run) == 29


def test_nothing_valid_is_an_error_that_tells_all(run):
    for path in run.glob("*.pth"):
        damage(path)
    with pytest.raises(CheckpointError, match="run holds no valid training state") as error:
        resume(run)
    for path in run.glob("*.pth"):
        assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_valid_checkpoint_is_read_once(run, monkeypatch):
    opened = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: opened.append(1) or load(*args, **kw))
    assert resume(run) == 29
    assert len(opened) == 1


def test_a_resumed_model_has_to_be_the_same(run):
    other = Checkpointer(torch.nn.Linear(3, 4), str(run), trainer=Trainer(), allow=["*"])
    with pytest.raises(CheckpointError, match="model_final.pth does not fit the model"):
        other.resume_or_load("", resume=True)
    more = Checkpointer(torch.nn.Sequential(model_of(1)), str(run), trainer=Trainer())
    with pytest.raises(CheckpointError, match="none of its 2 weights"):
        more.resume_or_load("", resume=True)


def test_a_resumed_model_has_to_be_filled_beyond_its_backbone(tmp_path):
    model = torch.nn.ModuleDict({"backbone": model_of(1), "head": model_of(1)})
    state = {"model": {"backbone." + key: w for key, w in model_of(2).state_dict().items()}}
    torch.save({**state, "iteration": 3}, tmp_path / "model_final.pth")
    run = Checkpointer(model, str(tmp_path), allow=["head.*"])
    run.load(str(tmp_path / "model_final.pth"))
    with pytest.raises(CheckpointError, match="it has no head.bias, head.weight; every weight"):
        run.resume_or_load("", resume=True)


def test_without_a_checkpoint_weights_are_loaded_alone(tmp_path, run, monkeypatch):
    weights = str(run / "model_0000009.pth")
    for folder, resume_ in ((tmp_path / "new", True), (run, False)):
        fresh = Checkpointer(model_of(-1), str(folder), trainer=Trainer(-1))
        assert fresh.resume_or_load(weights, resume=resume_)["iteration"] == 9
        assert (fresh.model.weight == 9).all()
        assert fresh.checkpointables["trainer"].state == -1
    # Nor is the present folder the run's where there is none.
    monkeypatch.chdir(run)
    assert not Checkpointer(model_of(-1)).has_checkpoint()
    fresh = Checkpointer(model_of(-1), str(tmp_path / "new"))
    assert fresh.resume_or_load("", resume=True) == {}
    assert (fresh.model.weight == -1).all()


# ---------------------------------------------------------------------------------------- loading


def test_strict_needs_weights(tmp_path):
    keys = r"\(MODEL.WEIGHTS, or train.init_checkpoint in a LazyConfig\)"
    with pytest.raises(CheckpointError, match=f"no weights are given: name a checkpoint {keys}"):
        Checkpointer(model_of(1), strict=True).load("")
    assert Checkpointer(model_of(1)).load("") == {}


def test_weights_that_are_not_finite_are_not_loaded(tmp_path):
    weights = model_of(1).state_dict()
    weights["bias"][1] = float("inf")
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth: the weight bias is not finite"):
        Checkpointer(model_of(2)).load(str(tmp_path / "a.pth"))


def test_damaged_and_hostile_weights_are_not_loaded(run, tmp_path, hostile):
    damage(run / "model_final.pth")
    torch.save({"model": {"weight": hostile}}, tmp_path / "hostile.pth")
    for path in (run / "model_final.pth", tmp_path / "hostile.pth", "http://127.0.0.1:1/a.pth"):
        fresh = Checkpointer(model_of(-1))
        with pytest.raises(CheckpointError):
            fresh.load(str(path))
        assert (fresh.model.weight == -1).all()


# --------------------------------------------------------------------------------------- removing


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def periodic(folder, *iterations):
    for iteration in iterations:
        save(folder, f"model_{iteration:07d}", iteration)
    return Checkpointer(model_of(0), str(folder))


def test_the_newest_periodic_checkpoints_stay(tmp_path):
    save(tmp_path, "model_final", 1)
    save(tmp_path, "model_best", 1)
    save(tmp_path, "other_0000001", 1)
    run = periodic(tmp_path, 5, 1000, 40)
    run.remove_old("model_", 2)
    rest = ["model_best.pth", "model_final.pth", "other_0000001.pth"]
    assert names(tmp_path) == sorted(["model_0000040.pth", "model_0001000.pth", *rest])
    run.remove_old("model_", 5)
    assert len(names(tmp_path)) == 5
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run.remove_old("model_", 0)


def test_the_last_checkpoint_stays(tmp_path):
    run = periodic(tmp_path, 1, 2, 3)
    run.tag_last_checkpoint("model_0000001.pth")
    run.remove_old("model_", 1)
    assert names(tmp_path) == ["model_0000001.pth", "model_0000003.pth"]


def test_the_only_valid_checkpoint_stays(tmp_path, caplog):
    run = periodic(tmp_path, 1, 2, 3)
    damage(tmp_path / "model_0000002.pth")
    damage(tmp_path / "model_0000003.pth")
    run.remove_old("model_", 2)
    assert len(names(tmp_path)) == 3
    assert "model_0000002.pth" in caplog.text
    assert resume(tmp_path) == 1
