"""A run that an earlier version began, recorded at commit 09ef8ea, goes on.

Of a RetinaNet of some 20,000 parameters, after four iterations on the digits of these tests:

    tools/train_net.py --config-file configs/Quick/retinanet_SASA.yaml \
        --train digits/train.json digits/train --test digits/val.json digits/val OPTIONS
"""

import lzma
import shutil
from pathlib import Path

import pytest

from sasa_det.checkpoint import read_checkpoint, write_checkpoint
from sasa_det.engine import Trainer, load_config

RECORDED = Path(__file__).with_name("recorded")
OPTIONS = [
    "SEED", 7, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.IMS_PER_BATCH", 4,
    "SOLVER.ACCUMULATION_STEPS", 2, "TEST.EVAL_PERIOD", 4, "TEST.VALIDATION_LOSS", True,
    "TEST.BEST_METRIC", "validation/total_loss", "TEST.BEST_MODE", "min",
    "MODEL.EMA.DECAY", 0.9, "MODEL.SASA.WIDTH_MULTIPLIER", 0.03125, "MODEL.SASA.STEM_HEADS", 1,
    "MODEL.SASA.NUM_HEADS", 1, "MODEL.FPN.OUT_CHANNELS", 8,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The output folder of the recorded run."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(RECORDED / "config.yaml", folder / "config.yaml")
    content = (RECORDED / "model_0000003.pth.xz").read_bytes()
    (folder / "model_0000003.pth").write_bytes(lzma.decompress(content))
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    return folder


def test_what_is_loaded_is_what_was_saved(folder, digits, assert_equal_runs):
    """Weights, averages, momenta, place in the data, best metric: all of it, bit for bit."""
    data = ((str(digits / f"{name}.json"), str(digits / name)) for name in ("train", "val"))
    opts = [str(word) for word in [*OPTIONS, "OUTPUT_DIR", folder]]
    trainer = Trainer(load_config("configs/Quick/retinanet_SASA.yaml", opts, *data))
    trainer.resume_or_load()
    trainer.checkpointer.save_dir = str(folder / "again")
    assert trainer.start_iter == 4
    trainer.checkpointer.save("model_0000003", iteration=trainer.iter, config="")
    path = folder / "again" / "model_0000003.pth"
    again = read_checkpoint(path)
    # Which metric is meant, and the ids of the classes, have come to the record since.
    assert again["trainer"].pop("category_ids") == list(range(1, 11))
    best = again["trainer"]["hooks"]["Evaluation"]["best"]
    assert (best.pop("name"), best.pop("mode")) == ("validation/total_loss", "min")
    write_checkpoint(again, path)
    assert_equal_runs(folder, folder / "again", name="model_0000003")


def test_the_run_goes_on(folder, command, capsys):
    before = read_checkpoint(folder / "model_0000003.pth")
    assert command("--resume", *OPTIONS) == 0
    assert "Starting training from iteration 4" in capsys.readouterr().out
    after = read_checkpoint(folder / "model_final.pth")
    assert after["iteration"] == 7
    states = after["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert {int(state["step"]) for state in states} == {8}
    assert after["trainer"]["_trainer"]["data_loader"]["images"] == 32
    assert any((value != before["model"][name]).any() for name, value in after["model"].items())
