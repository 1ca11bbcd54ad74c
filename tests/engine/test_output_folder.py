"""Output folders: what is resumed, what is refused, and nothing written over by accident."""

import pytest

from sasa_det.config.options import RunOptions
from sasa_det.engine import UsageError, load_config
from sasa_det.engine.output_folder import (
    claim_output,
    is_resumed,
    output_lock,
)

CONFIG = "configs/Quick/retinanet_SASA.yaml"
TRAINED = (
    "config.yaml", "log.txt", "log.txt.rank1", "metrics.json", "last_checkpoint",
    "model_0000001.pth", "model_best.pth", "model_final.pth", "events.out.tfevents.1.host",
)  # fmt: skip
RESULTS = ("inference/val/coco_instances_results.json", "inference/ema/val/results.json")


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the config of a run in tmp_path / "run"."""

    def make(*opts):
        return RunOptions.read(load_config(CONFIG, [*opts, "OUTPUT_DIR", str(tmp_path / "run")]))

    return make


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    return {folder / name for name in names}


def files(folder):
    return {p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("name", (*TRAINED, RESULTS[0]))
@pytest.mark.parametrize("eval_only", [False, True])
def test_a_run_is_not_written_over(name, eval_only, config, tmp_path):
    kept = fill(tmp_path / "run", name)
    with pytest.raises(UsageError) as error:
        with claim_output(config(), eval_only=eval_only):
            pass
    assert f"OUTPUT_DIR {tmp_path / 'run'} already holds {name} of a run; " in str(error.value)
    assert "--overwrite" in str(error.value)
    assert files(tmp_path / "run") == kept


def test_overwrite_removes_the_run_and_nothing_else(config, tmp_path):
    folder = tmp_path / "run"
    fill(folder, *TRAINED, *RESULTS, ".writing.pth")
    # It may be what the new run is configured with, and is written anew.
    kept = fill(folder, "config.yaml", "notes.txt", "plots/loss.png")
    with claim_output(config(), overwrite=True) as output:
        assert not output.resumed
        # What is found wrong before the run begins costs nothing.
        assert files(folder) > kept
        output.clear()
        assert files(folder) == kept
    assert not list(folder.glob(".writing.*"))


def test_evaluation_removes_results_alone(config, tmp_path):
    kept = fill(tmp_path / "run", *TRAINED)
    fill(tmp_path / "run", *RESULTS)
    with claim_output(config(), eval_only=True, overwrite=True) as output:
        output.clear()
        assert files(tmp_path / "run") == kept


def test_evaluation_of_a_run_adds_results_but_replaces_none(config, tmp_path):
    fill(tmp_path / "run", *TRAINED)
    with claim_output(config(), eval_only=True, resume="always") as output:
        assert output.resumed
    fill(tmp_path / "run", *RESULTS)
    with pytest.raises(UsageError, match="already holds inference/"):
        with claim_output(config(), eval_only=True, resume="always"):
            pass
    with claim_output(config(), eval_only=True, resume="always", overwrite=True) as output:
        assert output.resumed
        output.clear()
    assert not files(tmp_path / "run") & {tmp_path / "run" / name for name in RESULTS}


def test_overwrite_does_not_touch_a_run_that_is_running(config, tmp_path):
    kept = fill(tmp_path / "run", *TRAINED)
    with output_lock(tmp_path / "run"):
        with pytest.raises(UsageError, match="is in use by another run"):
            with claim_output(config(), overwrite=True):
                pass
        assert files(tmp_path / "run") == kept


def test_weights_that_overwrite_would_remove(config, tmp_path):
    kept = fill(tmp_path / "run", "model_final.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "run" / "model_final.pth")
    for weights in (tmp_path / "run" / "model_final.pth", tmp_path / "link.pth"):
        with pytest.raises(UsageError, match="would be removed by --overwrite"):
            with claim_output(config("MODEL.WEIGHTS", str(weights)), overwrite=True):
                pass
    assert files(tmp_path / "run") == kept


def test_nothing_to_resume(config, tmp_path):
    folder = tmp_path / "run"
    for names in ((), ("config.yaml", "log.txt"), ("last_checkpoint",)):
        fill(folder, *names)
        with pytest.raises(UsageError) as error:
            with claim_output(config(), resume="always"):
                pass
        assert f"OUTPUT_DIR {folder} holds no checkpoint to resume" in str(error.value)
        assert "--resume auto" in str(error.value)


def test_resume_auto_begins_what_was_stopped_before_its_first_checkpoint(config, tmp_path):
    folder = tmp_path / "run"
    with claim_output(config(), resume="auto") as output:
        assert not output.resumed
    kept = fill(folder, "config.yaml", "log.txt", "metrics.json", "events.out.tfevents.1.host")
    with claim_output(config("SEED", "3"), resume="auto") as output:
        assert not output.resumed
    assert files(folder) == kept


def test_resume_goes_on_with_what_fits(config, tmp_path):
    folder = tmp_path / "run"
    fill(folder, *TRAINED)
    (folder / "config.yaml").write_text(config().dump())
    kept = files(folder)
    for resume in ("always", "auto"):
        with claim_output(config("SOLVER.MAX_ITER", "9"), resume=resume) as output:
            assert output.resumed
        with pytest.raises(UsageError, match=r"SEED \(from -1 to 3\)"):
            with claim_output(config("SEED", "3"), resume=resume):
                pass
        with pytest.raises(UsageError, match="--resume and --overwrite exclude each other"):
            with claim_output(config(), resume=resume, overwrite=True):
                pass
    assert files(folder) == kept


def test_other_processes_of_a_run_leave_the_folder_to_the_first(config, tmp_path):
    kept = fill(tmp_path / "run", *TRAINED)
    with output_lock(tmp_path / "run"):
        with claim_output(config(), overwrite=True, leader=False) as output:
            assert not output.resumed
        with claim_output(config(), resume="auto", leader=False) as output:
            assert output.resumed
    assert files(tmp_path / "run") == kept


def test_a_mistake_leaves_a_folder_as_it_was(config, tmp_path):
    folder = tmp_path / "run"

    def fail(**options):
        with pytest.raises(UsageError, match="wrong"):
            with claim_output(config(), **options) as output:
                fill(folder, "log.txt.rank7", "events.out.tfevents.2.host")
                assert not output.removable or not output.resumed
                raise UsageError("something is wrong.")

    fail()
    assert not folder.exists()
    kept = fill(folder, *TRAINED, "notes.txt")
    fail(overwrite=True)
    assert files(folder) == kept
    kept = fill(tmp_path / "other", "notes.txt")
    folder = tmp_path / "other"
    options = RunOptions.read(load_config(CONFIG, ["OUTPUT_DIR", str(folder)]))
    with claim_output(options) as output:
        fill(folder, "config.yaml", "log.txt")
        output.discard()
    assert files(folder) == kept


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_before_anything_was_saved_leaves_no_run(saved, config, tmp_path):
    names = ["config.yaml", "log.txt", *(["model_0000001.pth"] if saved else [])]
    with pytest.raises(KeyboardInterrupt), claim_output(config()):
        kept = fill(tmp_path / "run", *names)
        raise KeyboardInterrupt
    assert files(tmp_path / "run") == (kept if saved else set())


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    options = RunOptions.read(load_config(CONFIG, ["OUTPUT_DIR", str(tmp_path / "file")]))
    with pytest.raises(UsageError, match="file is a file; it must be a folder"):
        with claim_output(options, overwrite=True):
            pass


def test_is_resumed(config, tmp_path):
    assert not is_resumed(config(), "auto")
    fill(tmp_path / "run", "model_0000001.pth")
    assert is_resumed(config(), "auto") and is_resumed(config(), "always")
    assert not is_resumed(config(), None)
