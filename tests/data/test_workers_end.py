"""Processes that read data end with the process that they read for, also if that is killed."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

# Prints a line when all loaders have given a batch. Batches are larger than a pipe holds, so that
# the workers wait in the middle of one when nobody takes it any more.
SCRIPT = """
import sys

from detectron2.config import LazyCall, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from omegaconf import OmegaConf

import sasa_det
from sasa_det.config import add_sasa_config
from sasa_det.config.options import RunOptions
from sasa_det.data import build_classification_test_loader, build_classification_train_loader
from sasa_det.data import build_test_mapper, classification
from sasa_det.engine.tasks import task_of
from sasa_det.engine.trainer import LazyTrainer

LARGE = "x" * 1_000_000


def records():
    size = {"height": 4, "width": 6, "image_id": 0, "label": 0, "annotations": []}
    return [{"file_name": sys.argv[1], "more": LARGE, **size} for _ in range(40)]


class Mapper(classification.ClassificationMapper):
    def __call__(self, record):
        return {**super().__call__(record), "file_name": LARGE}


DatasetCatalog.register("set", records)
MetadataCatalog.get("set").set(thing_classes=["a"], evaluator_type="coco")
classification.ClassificationMapper = Mapper
cfg = get_cfg()
add_sasa_config(cfg)
cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("set",)
cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 2, False
cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.IMS_PER_BATCH, cfg.MODEL.DEVICE = 2, 1, "cpu"
cfg.INPUT.FORMAT = "RGB"
test = LazyCall(build_detection_test_loader)(
    dataset=LazyCall(get_detection_dataset_dicts)(names="", filter_empty=False),
    mapper=LazyCall(build_test_mapper)(cfg=cfg),
    num_workers=2,
)
lazy = {"model": {"_target_": "RetinaNet"}, "dataloader": {"test": test}}
lazy = OmegaConf.create(lazy, flags={"allow_objects": True})
task = task_of(RunOptions.read(cfg))
loaders = {
    "training": lambda: task.train_loader(),
    "evaluation": lambda: task.test_loader("set"),
    "validation loss": lambda: task.validation_batches(),
    "evaluation of a LazyConfig": lambda: LazyTrainer.build_test_loader(lazy, "set"),
    "training of a classifier": lambda: build_classification_train_loader(cfg, 0),
    "evaluation of a classifier": lambda: build_classification_test_loader(cfg, "set"),
}
begun = [iter(loaders[name]()) for name in sys.argv[2:] or loaders]
for batches in begun:
    next(batches)
print(f"read by {len(begun)}", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def begin(tmp_path):
    """Return a function that starts a script in a session of its own, which ends with the test."""
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    processes = []

    def start(script):
        process = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "a.png"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def test_workers_of_all_loaders_end_when_their_parent_is_killed(begin):
    process = begin(SCRIPT)
    assert process.stdout.readline() == b"read by 6\n"
    process.kill()
    # The output ends when the last worker, which has inherited it, has ended.
    assert process.communicate(timeout=60) == (b"", None)
    assert process.returncode == -signal.SIGKILL
