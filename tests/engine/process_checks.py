"""Checks of two processes, which test_distributed.py runs on CPUs."""

import datetime
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from sasa_det.checkpoint import Checkpointer
from sasa_det.engine.hooks import Checkpoints
from sasa_det.engine.launch import first_to_say, launch
from sasa_det.errors import CheckpointError


class SlowCheckpointer(Checkpointer):
    """Saves after the other process has had time to go on, and tells whether it has."""

    def save(self, name, **options):
        if comm.is_main_process():
            try:
                other.wait(["gone on"], datetime.timedelta(seconds=1))
                self.waited = False
            except RuntimeError:
                self.waited = True
        super().save(name, **options)


def check(folder: str) -> int:
    global other
    other = dist.FileStore(f"{folder}/store", 2)
    model = nn.Linear(2, 2)
    checkpointer = SlowCheckpointer(model, folder)
    checkpoints = Checkpoints(checkpointer, 5)
    checkpoints.trainer = SimpleNamespace(iter=0, max_iter=10)
    checkpoints.save_now()
    if not comm.is_main_process():
        other.set("gone on", "yes")
    assert not comm.is_main_process() or checkpointer.waited

    # What one process cannot save ends all of them.
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    checkpoints.trainer.iter = 1
    try:
        checkpoints.save_now()
    except CheckpointError as error:
        message = str(error)
    assert "the weight weight is not finite" in message

    assert comm.all_gather(first_to_say(message)).count(True) == 1
    assert comm.all_gather(first_to_say(f"of process {comm.get_rank()}")) == [True, True]
    return 0


if __name__ == "__main__":
    sys.exit(launch(check, 2, device="cpu", args=(sys.argv[1],)))
