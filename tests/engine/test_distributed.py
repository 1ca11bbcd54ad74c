"""Several processes on CPUs, by gloo: one batch split among them trains as in one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sasa_det.checkpoint import read_checkpoint
from sasa_det.engine import argument_parser, run

pytestmark = pytest.mark.slow

# Norms that need no other image than their own. AdamW's first steps have the signs of gradients,
# rounding included: plain SGD shows what the gradients are.
OPTIONS = [
    "MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01,
    "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3,
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
    "MODEL.RETINANET.NORM", "FrozenBN", "TEST.VALIDATION_LOSS", True,
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


def finished(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def test_two_processes_train_as_one(start, alone, tmp_path):
    output = finished(start("--num-gpus", 2, *OPTIONS))
    assert_close_runs(alone, tmp_path / "run")
    # It did train, and both took part in the evaluation of all 3 images.
    first = read_checkpoint(alone / "model_0000002.pth")["model"]
    assert any((value != first[name]).any() for name, value in weights(alone).items())
    assert "Start inference on 2 batches" in output
    assert "AP,AP50,AP75" in output
    records = [(folder / "metrics.json").read_text() for folder in (alone, tmp_path / "run")]
    losses = [json.loads(text.splitlines()[-1])["validation/total_loss"] for text in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_processes_wait_for_a_save_and_tell_an_error_once(tmp_path):
    """A launcher ends the others half a minute after the first one has ended."""
    script = Path(__file__).with_name("process_checks.py")
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_signals_stop_all_processes_of_a_run_which_goes_on(
    start, read_until, alone, command, tmp_path
):
    """To the whole group, as from a scheduler or a terminal, and to the launcher alone."""
    for send, number, status in (
        (os.killpg, signal.SIGTERM, 143),
        (os.kill, signal.SIGINT, 130),
    ):
        process = start(
            *("--num-gpus", 2, "--resume", "auto"), *OPTIONS, "DATALOADER.NUM_WORKERS", 1
        )
        output = read_until(process, "Saving checkpoint")
        send(process.pid, number)
        output += process.communicate()[0]
        assert process.returncode == status, output
        assert output.count(f"{number.name} was received; everything is saved") == 1
        assert "Traceback" not in output
    # With another number of processes.
    assert command("--resume", *OPTIONS) == 0
    assert_close_runs(alone, tmp_path / "run")


@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_processes_save_and_end_when_the_one_that_launched_them_is_killed(
    start, read_until, launcher
):
    words = [*OPTIONS, "SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 1]
    process = start(*([] if launcher else ["--num-gpus", 2]), *words, launcher=launcher)
    read_until(process, "Saving checkpoint")
    process.kill()
    # The output ends when the last of them and of those that read their data has ended, which have
    # all inherited it.
    output = process.communicate(timeout=120)[0]
    assert "SIGTERM was received; everything is saved" in output


def workers(parent):
    """The processes that a process has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


def test_torchrun_restarts_from_the_last_checkpoint(start, read_until, alone, tmp_path):
    process = start(*OPTIONS, launcher=(*TORCHRUN, "--max-restarts", "1"))
    output = read_until(process, "model_0000005.pth")
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    output += process.communicate()[0]
    assert process.returncode == 0, output
    begun = [int(number) for number in re.findall("training from iteration ([0-9]+)", output)]
    assert len(begun) == 2 and begun[0] == 0 and begun[1] >= 6
    assert_close_runs(alone, tmp_path / "run")


def test_torchrun_tells_mistakes_once(start):
    mistakes = ("SOLVER.BASE_LR", -1), ("MODEL.SASA.NUM_HEADS", 5)
    value, model = (start(*mistake, launcher=TORCHRUN) for mistake in mistakes)
    output = value.communicate()[0]
    assert value.returncode != 0
    assert output.count("error: SOLVER.BASE_LR must be") == 1
    assert "Traceback" not in output.split("error: SOLVER")[0]
    output = model.communicate()[0]
    assert model.returncode != 0
    assert output.count("must be a multiple of num_heads 5") == 1
