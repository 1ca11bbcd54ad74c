"""A run is extended as detectron2's are: a script with a trainer of one's own."""

import json
import runpy
import sys

import pytest

from sasa_det.engine import argument_parser, run

pytestmark = pytest.mark.slow

# As the docstring of tools/train_net.py has it.
SCRIPT = """
import sys
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator

from sasa_det.data import DetectionMapper, build_train_loader
from sasa_det.engine import Trainer, argument_parser, run


class InvertingMapper(DetectionMapper):
    def __call__(self, record):
        mapped = super().__call__(record)
        mapped["image"] = 255 - mapped["image"]
        return mapped


class Counter(DatasetEvaluator):
    def reset(self):
        self.number = 0

    def process(self, inputs, outputs):
        self.number += len(inputs)

    def evaluate(self):
        return {"counted": {"images": self.number}}


class Brightness(HookBase):
    def after_step(self):
        batch = next(iter(self.trainer.data_loader))
        mean = sum(sample["image"].float().mean().item() for sample in batch) / len(batch)
        self.trainer.storage.put_scalar("brightness", mean, smoothing_hint=False)

    def state_dict(self):
        return {"steps": self.trainer.iter + 1}

    def load_state_dict(self, state):
        print(f"{state['steps']} steps were done before.")


class MyTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, mapper=InvertingMapper(cfg, is_train=True))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return Counter()

    def build_hooks(self):
        return [Brightness(), *super().build_hooks()]


if __name__ == "__main__":
    sys.exit(run(argument_parser().parse_args(), trainer=MyTrainer))
"""


# Such a mapper resizes images as detectron2's does.
OPTIONS = ["SEED", 1, "INPUT.MIN_SIZE_TRAIN", "(64,)"]


def test_a_trainer_with_its_own_mapper_evaluator_and_hook(words, tmp_path, monkeypatch, capsys):
    script = tmp_path / "my_train_net.py"
    script.write_text(SCRIPT)
    trainer = runpy.run_path(script)["MyTrainer"]
    begun = argument_parser().parse_args(words("SOLVER.MAX_ITER", 2, *OPTIONS))
    assert run(begun, trainer=trainer) == 0
    # And as a command.
    command = [str(script), *words("--resume", "SOLVER.MAX_ITER", 4, *OPTIONS)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script, run_name="__main__")
    assert "2 steps were done before." in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["counted/images"] for line in metrics] == [3, 3]
    # The digits are bright on dark ground, and the crops' border is grey.
    assert all(line["brightness"] > 128 for line in metrics)
