"""Runs of a tiny detector on a few digits, in this process and in processes of their own."""

import fcntl
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sasa_det.checkpoint import read_checkpoint
from sasa_det.data import write_digits
from sasa_det.engine import argument_parser, run

CONFIG = "configs/Quick/retinanet_SASA.yaml"
ForkedCommand = runpy.run_path(Path(__file__).with_name("forked_command.py"))["ForkedCommand"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of a small data set: 8 images to train on, 3 to test on."""
    return write_digits(
        tmp_path_factory.mktemp("data") / "digits", num_train=8, num_val=3, image_size=64
    )


@pytest.fixture
def words(digits, tmp_path):
    """Return a function that completes a command's words with config, data and output folder."""

    def complete(*words, train=None, test=None):
        train = train or (digits / "train.json", digits / "train")
        test = test or (digits / "val.json", digits / "val")
        words = ["--config-file", CONFIG, "--train", *train, "--test", *test, *words]
        if "OUTPUT_DIR" not in words:
            words += ["OUTPUT_DIR", tmp_path / "run"]
        return [str(word) for word in words]

    return complete


@pytest.fixture
def command(words):
    """Return a function that runs a command line in this process and gives its exit status."""

    def call(*args, **kwargs):
        return run(argument_parser().parse_args(words(*args, **kwargs)))

    return call


@pytest.fixture
def start(words):
    """Return a function that starts a command in a process of its own, all output in one pipe.

    With a launcher, it is one that Python starts.
    """
    processes = []

    def begin(*args, launcher=(), tool="tools/train_net.py", data=None, **kwargs):
        # `data` stands for the words about config and data.
        words_ = words(*args, **kwargs) if data is None else [str(w) for w in (*data, *args)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if launcher:
            process = subprocess.Popen(
                [sys.executable, *launcher, tool, *words_],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                start_new_session=True,
            )
        else:
            process = ForkedCommand([str(tool), *words_], env)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()


@pytest.fixture
def read_until():
    """Return a function that reads a process's output up to a line that holds some words."""

    def read(process, words):
        output = ""
        for line in process.stdout:
            output += line
            if words in line:
                return output
        raise AssertionError(f"it ended without {words!r}:\n{output}")

    return read


@pytest.fixture
def assert_equal_runs():
    """Return a function that holds a checkpoint of two runs equal, bit for bit."""

    def check(*folders, name="model_final"):
        one, other = (leaves(read_checkpoint(folder / f"{name}.pth")) for folder in folders)
        assert len(one) > 500 and one.keys() == other.keys()
        for path, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[path]), path
            elif path != "/config":  # which has the name of the folder
                assert value == other[path], path

    return check


@pytest.fixture
def plain_torchscript():
    """Keep TorchScript from specializing functions after some calls, which changes results."""
    with torch.jit.optimized_execution(False):
        yield


def leaves(value, path=""):
    """Map the paths of all that nested containers hold to it."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in leaves(part, f"{path}/{key}").items()}
    return {path: value}


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """The checkpoint of a detector that has learnt the 8 images of ``digits`` by heart."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: one trains, and the others wait
    checkpoint = shared / "trained" / "model_final.pth"
    with open(shared / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not checkpoint.exists():
            learn_by_heart(digits, checkpoint.parent)
    return checkpoint


def learn_by_heart(digits, folder):
    data = digits / "train.json", digits / "train"
    options = [
        "SEED", 1, "SOLVER.MAX_ITER", 100, "SOLVER.IMS_PER_BATCH", 4,
        "SOLVER.CHECKPOINT_PERIOD", 1000,
        "INPUT.JITTER.MIN_SCALE", 1.0, "INPUT.JITTER.MAX_SCALE", 1.0,
        # An exported file holds the operators of each layer and head of attention.
        "MODEL.SASA.NUM_HEADS", 2, "MODEL.SASA.ATTENTION_STAGES", "['res3', 'res5']",
    ]  # fmt: skip
    config = Path(__file__).parents[2] / CONFIG
    words = ["--config-file", config, "--train", *data, "--test", *data, *options]
    words += ["OUTPUT_DIR", folder]
    assert run(argument_parser().parse_args([str(word) for word in words])) == 0
