"""Several processes on CPUs, by gloo: one batch split among them trains as in one process."""

import os
import re
import signal
from pathlib import Path

import pytest

from sasa_det.checkpoint import read_checkpoint
from sasa_det.engine import argument_parser, run

pytestmark = pytest.mark.slow

# Norms that need no other image than their own. AdamW's first steps have the signs of gradients,
# rounding included: plain SGD shows what the gradients are.
OPTIONS = [
    "MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01,
    "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 18, "SOLVER.CHECKPOINT_PERIOD", 3,
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
    "MODEL.RETINANET.NORM", "FrozenBN", "TEST.VALIDATION_LOSS", True,
    "TEST.EVAL_PERIOD", 3,
]  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.5",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # fmt: skip


def weights(folder):
    return read_checkpoint(folder / "model_final.pth")["model"]


def assert_close_runs(one, other):
    one, other = weights(one), weights(other)
    moved = 0.0
    for name, value in one.items():
        if value.is_floating_point() and value.numel():
            difference = (value - other[name]).abs().max().item()
            assert difference <= 1e-6 * max(1.0, value.abs().max().item()), name
            moved = max(moved, difference)
    assert moved < 1e-6


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = ["--config-file", "configs/Quick/retinanet_SASA.yaml"]
    for split, name in (("train", "train"), ("test", "val")):
        words += [f"--{split}", digits / f"{name}.json", digits / name]
    words = [str(word) for word in [*words, *OPTIONS, "OUTPUT_DIR", folder]]
    assert run(argument_parser().parse_args(words)) == 0
    return folder


def test_two_processes_train_as_one_and_save_when_they_are_stopped(
    start, read_until, alone, command, tmp_path
):
    """By a signal to the launcher, and if it is killed; one process ends what two have begun."""
    folder = tmp_path / "run"
    words = ["--num-gpus", 2, "--resume", "auto", *OPTIONS, "DATALOADER.NUM_WORKERS", 1]
    process = start(*words)
    output = read_until(process, "model_0000005.pth")
    process.send_signal(signal.SIGINT)
    output += process.communicate()[0]
    assert process.returncode == 130, output
    assert output.count("SIGINT was received; everything is saved") == 1
    assert "Traceback" not in output
    # Both took part in the evaluation of all 3 images.
    assert "Start inference on 2 batches" in output

    process = start(*words)
    output = read_until(process, "Saving checkpoint")
    assert int(re.search("training from iteration ([0-9]+)", output)[1]) >= 6
    process.kill()
    # The output ends when the last of them and of those that read their data has ended, which have
    # all inherited it.
    assert "SIGTERM was received; everything is saved" in process.communicate(timeout=120)[0]

    assert command("--resume", *OPTIONS) == 0
    assert_close_runs(alone, folder)
    first = read_checkpoint(alone / "model_0000002.pth")["model"]
    assert any((value != first[name]).any() for name, value in weights(alone).items())


def test_what_two_processes_do(start, tmp_path):
    """Saves, errors, evaluation, signals and models in shards, in process_checks.py."""
    process = start(tool=Path(__file__).with_name("process_checks.py"), data=[tmp_path])
    # Where processes wait for one another in vain, this ends it. A launcher ends the others half a
    # minute after the first one has ended.
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


def workers(parent):
    """The processes that a process has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


def test_torchrun_restarts_from_the_last_checkpoint(start, read_until, alone, command, tmp_path):
    """And its processes save and end if torchrun itself is killed."""
    words = [*OPTIONS, "DATALOADER.NUM_WORKERS", 1]
    process = start(*words, launcher=(*TORCHRUN, "--max-restarts", "1"))
    output = read_until(process, "model_0000005.pth")
    assert "training from iteration 0" in output
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    output = read_until(process, "training from iteration")
    assert int(re.search("training from iteration ([0-9]+)", output)[1]) >= 6
    read_until(process, "Saving checkpoint")
    process.kill()
    output = process.communicate(timeout=120)[0]
    assert "SIGTERM was received; everything is saved" in output, output
    assert command("--resume", *OPTIONS) == 0
    assert_close_runs(alone, tmp_path / "run")


# One is found by all processes, which read the config, and one by the first, which checks the run.
MISTAKES = """
import sys
from sasa_det.engine import argument_parser, run

for mistake in (["SOLVER.BASE_LR", "-1"], ["MODEL.SASA.NUM_HEADS", "5"]):
    status = run(argument_parser().parse_args([*sys.argv[1:], *mistake]))
    print("status", status, flush=True)
sys.exit(status)
"""


def test_torchrun_tells_mistakes_once(start, tmp_path):
    script = tmp_path / "mistakes.py"
    script.write_text(MISTAKES)
    process = start(launcher=TORCHRUN, tool=script)
    output = process.communicate()[0]
    assert process.returncode != 0
    assert output.count("status 2") == 4
    assert output.count("error: SOLVER.BASE_LR must be") == 1
    assert output.count("must be a multiple of num_heads 5") == 1
    assert "Traceback" not in output[: output.rindex("status 2")]
