"""A run that is interrupted and resumed gives, bit for bit, what an unbroken run gives.

With any number of processes that read the data, which changes from one resumption to the next.
"""

import re
import signal

import pytest

pytestmark = pytest.mark.slow

OPTIONS = [
    "SEED", 7, "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 8,
    "MODEL.EMA.DECAY", 0.9, "TEST.BEST_METRIC", "validation/total_loss", "TEST.BEST_MODE", "min",
    "TEST.VALIDATION_LOSS", True, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 2,
    "SOLVER.MAX_CHECKPOINTS", 2,
]  # fmt: skip


def finished(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def iteration(output):
    return int(re.search(r"Starting training from iteration (\d+)", output)[1])


# What is sent when the log says what: while a run saves, while it evaluates, in the first step; and
# how many processes read the data until then.
INTERRUPTIONS = [
    (signal.SIGTERM, 143, "Saving checkpoint", 2),
    (signal.SIGKILL, -signal.SIGKILL, "Start inference", 2),
    (signal.SIGUSR1, 143, "Start inference", 0),
    (signal.SIGINT, 130, "Starting training", 2),
]


def test_an_interrupted_run_is_bit_equal(start, read_until, assert_equal_runs, tmp_path):
    # In processes of their own: TorchScript keeps what it has specialized in this one.
    unbroken = start(*OPTIONS, "OUTPUT_DIR", tmp_path / "unbroken")
    begun = []
    for number, status, moment, num_workers in INTERRUPTIONS:
        process = start("--resume", "auto", *OPTIONS, "DATALOADER.NUM_WORKERS", num_workers)
        output = read_until(process, moment)
        process.send_signal(number)
        output += process.communicate()[0]
        assert process.returncode == status, output
        if number != signal.SIGKILL:
            assert f"{number.name} was received; everything is saved" in output
            assert "Traceback" not in output
        begun.append(iteration(output))
    begun.append(iteration(finished(start("--resume", *OPTIONS))))
    assert begun == sorted(begun) and begun[0] == 0 and 4 < begun[1] and begun[-1] < 20
    finished(unbroken)
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run").glob("model_*.pth")}
    assert len(kept - {"model_final.pth", "model_best.pth"}) == 2
