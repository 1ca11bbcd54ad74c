"""Checks of two processes on CPUs, which test_distributed.py runs, with those of other files."""

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from detectron2.utils import comm
from sharded_checks import check_shards
from stop_checks import check_stops
from torch import nn

from sasa_det.checkpoint import Checkpointer
from sasa_det.engine.hooks import Checkpoints
from sasa_det.engine.launch import first_to_say, launch
from sasa_det.errors import CheckpointError
from sasa_det.evaluation.accuracy import ClassificationEvaluator
from sasa_det.evaluation.validation_loss import validation_losses


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
    torch.set_num_threads(1)
    check_saves(folder)
    check_accuracy()
    check_validation_losses()
    check_stops()
    check_shards(Path(folder, "shards"))
    return 0


def check_saves(folder: str) -> None:
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


def check_accuracy() -> None:
    """Each process counts its images, and the first one gets the accuracy of all."""
    # The classes of the images and those with the highest scores, behind which 0, 1, 2, ... follow.
    labels, best = [([0, 1, 5], [0, 0, 5]), ([2, 6], [2, 0])][comm.get_rank()]
    scores = torch.arange(0.0, -7.0, -1.0).repeat(len(best), 1)
    scores[range(len(best)), best] = 1.0
    evaluator = ClassificationEvaluator("set")
    evaluator.process({"label": torch.tensor(labels)}, [{"scores": each} for each in scores])
    counted = {"top1": 60.0, "top5": 80.0, "images": 5, "unreadable": 0}
    expected = {"classification": counted} if comm.is_main_process() else {}
    assert evaluator.evaluate() == expected


class Sum(nn.Module):
    def forward(self, batch):
        return {"loss": sum(batch)}


def check_validation_losses() -> None:
    """A mean over the batches of all processes, of which one has more than the other."""
    batches = [[[1.0, 2.0], [3.0]], [[10.0]]][comm.get_rank()]
    mean = (1.0 + 2.0 + 3.0 + 10.0) / 3
    assert validation_losses(Sum(), batches) == {"loss": mean, "total_loss": mean}


if __name__ == "__main__":
    sys.exit(launch(check, 2, device="cpu", args=(sys.argv[1],)))
