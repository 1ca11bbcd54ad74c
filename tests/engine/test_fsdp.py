"""Runs of a model that is sharded among processes; sharded_checks.py looks at what is computed."""

import os
import shutil
import signal

import pytest
import torch

from sasa_det.checkpoint import read_checkpoint
from sasa_det.config.options import RunOptions
from sasa_det.engine import Trainer, load_config
from sasa_det.engine.checks import check_run
from sasa_det.errors import UsageError

# As in test_distributed.py: plain SGD, and norms that need no other image than their own.
OPTIONS = [
    "MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.01,
    "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3,
    "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
    "MODEL.RETINANET.NORM", "FrozenBN", "MODEL.EMA.DECAY", 0.9, "TEST.EVAL_PERIOD", 6,
]  # fmt: skip


def tensors(value, path=""):
    """Map the paths of all floating-point tensors in nested containers to them."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in tensors(part, f"{path}/{key}").items()}
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
    return {path: value} if is_number else {}


def assert_close_runs(*folders):
    one, other = (tensors(read_checkpoint(folder / "model_final.pth")) for folder in folders)
    # Weights, their averages and momenta.
    assert one.keys() == other.keys()
    assert {path.split("/")[1] for path in one} == {"model", "ema", "trainer"}
    for path, value in one.items():
        difference = (value - other[path]).abs().max().item()
        assert difference <= 1e-6 * max(1.0, value.abs().max().item()), path


@pytest.fixture
def alone(command, tmp_path):
    """The folder of a run in one process."""
    assert command(*OPTIONS, "OUTPUT_DIR", tmp_path / "alone") == 0
    return tmp_path / "alone"


@pytest.mark.slow
def test_a_run_changes_between_one_process_and_shards(alone, start, read_until, command, tmp_path):
    """What one process began goes on in two, and what these leave ends in one."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "model_0000002.pth"):
        shutil.copy(alone / name, folder)
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    words = [*OPTIONS, "MODEL.FSDP", True, "DATALOADER.NUM_WORKERS", 1]
    two = start("--num-gpus", 2, "--dist-url", "auto", "--resume", *words)
    # At iteration 5, of one and of two images; then a signal to all, as of a scheduler.
    output = read_until(two, "Start inference on 2 batches")
    output += read_until(two, "Saving checkpoint")
    os.killpg(two.pid, signal.SIGTERM)
    output += two.communicate()[0]
    assert two.returncode == 143, output
    assert output.count("SIGTERM was received; everything is saved") == 1
    assert "Traceback" not in output
    assert not (folder / "model_final.pth").exists()
    assert command("--resume", *OPTIONS) == 0
    assert_close_runs(alone, folder)


@pytest.mark.parametrize(
    ("opts", "num_processes", "message"),
    [
        ([], 1, "MODEL.FSDP must be False in a run of one process"),
        (["MODEL.CHANNELS_LAST", "True"], 2, "MODEL.CHANNELS_LAST must be False if MODEL.FSDP"),
        (["MODEL.COMPILE", "True"], 2, "MODEL.COMPILE must be False if MODEL.FSDP is True"),
    ],
)
def test_what_cannot_be_sharded(digits, tmp_path, opts, num_processes, message):
    sources = [(str(digits / f"{name}.json"), str(digits / name)) for name in ("train", "val")]
    opts = ["MODEL.FSDP", "True", "OUTPUT_DIR", str(tmp_path / "run"), *opts]
    cfg = load_config("configs/Quick/retinanet_SASA.yaml", opts, *sources)
    with pytest.raises(UsageError, match=message):
        check_run(RunOptions.read(cfg), Trainer, num_processes=num_processes)
