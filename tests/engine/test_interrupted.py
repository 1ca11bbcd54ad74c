"""Runs that are interrupted and resumed give, bit for bit, what an unbroken run gives."""

import re
import signal

import pytest

pytestmark = pytest.mark.slow

OPTIONS = [
    "SEED", 7, "SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 8,
    "MODEL.EMA.DECAY", 0.9, "TEST.BEST_METRIC", "validation/total_loss", "TEST.BEST_MODE", "min",
    "TEST.VALIDATION_LOSS", True, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 2,
    "SOLVER.MAX_CHECKPOINTS", 2,
]  # fmt: skip


def iteration(output):
    return int(re.search(r"Starting training from iteration (\d+)", output)[1])


# What is sent when the log says what: while it saves, while it evaluates, in the first step.
INTERRUPTIONS = [
    (signal.SIGTERM, 143, "Saving checkpoint"),
    (signal.SIGKILL, -signal.SIGKILL, "Start inference"),
    (signal.SIGUSR1, 143, "Start inference"),
    (signal.SIGINT, 130, "Starting training"),
]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_runs_are_bit_equal(num_workers, start, assert_equal_runs, tmp_path):
    options = [*OPTIONS, "DATALOADER.NUM_WORKERS", num_workers]
    unbroken = start(*options, "OUTPUT_DIR", tmp_path / "unbroken")
    output = unbroken.communicate()[0]
    assert unbroken.returncode == 0, output
    options += ["OUTPUT_DIR", tmp_path / "run"]
    begun = []
    for number, status, moment in INTERRUPTIONS:
        process = start("--resume", "auto", *options)
        output = ""
        for line in process.stdout:
            output += line
            if moment in line:
                process.send_signal(number)
                break
        output += process.communicate()[0]
        assert process.returncode == status, output
        if number != signal.SIGKILL:
            assert f"{number.name} was received; everything is saved" in output
            assert "Traceback" not in output
        begun.append(iteration(output))
    process = start("--resume", *options)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    begun.append(iteration(output))
    assert begun == sorted(begun) and begun[0] == 0 and 4 < begun[1] and begun[-1] < 24
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run").glob("model_*.pth")}
    assert len(kept - {"model_final.pth", "model_best.pth"}) == 2
