#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's flags and KEY VALUE overrides.

To change what a run does, copy this file and give :func:`run` a trainer of your own. Its methods
are those of detectron2's DefaultTrainer::

    class MyTrainer(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, mapper=MyMapper(cfg))  # of sasa_det.data

        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return MyEvaluator(dataset_name)

        def build_hooks(self):
            # First: what it writes and its state go into the metrics and checkpoints of the step.
            return [MyHook(), *super().build_hooks()]

    run(argument_parser().parse_args(), trainer=MyTrainer)
"""

import os
import signal
import sys

# Until run_command takes Ctrl-C over: the imports take seconds.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from sasa_det.command_line import run_command
from sasa_det.engine import Trainer, argument_parser, run

if __name__ == "__main__":
    sys.exit(run_command(lambda: run(argument_parser().parse_args(), trainer=Trainer)))
