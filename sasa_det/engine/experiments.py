"""Trainings that are compared with each other: run side by side, resumed, and read again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.convert import convert_checkpoint
from ..config.load import load_config
from ..errors import UsageError
from ..utils.cores import available_cores
from ..utils.files import write_text

logger = logging.getLogger("sasa_det")

_RECORD = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """One training with its evaluations.

    Attributes:
        name: of its folder, unique among those that share an output.
        tool: the command in tools/ that trains, "train_net" or "train_imagenet".
        config: the config file, relative to the folder of configs.
        overrides: KEY VALUE pairs in one list.
        metric: what its evaluations are followed by in metrics.json, such as "bbox/AP".
        after: name of the experiment whose final backbone this one starts from, or "".
    """

    name: str
    tool: str
    config: str
    overrides: tuple[str, ...] = ()
    metric: str = "bbox/AP"
    after: str = ""


@dataclass
class Outcome:
    """What an experiment came to.

    Attributes:
        curve: (iteration, value) of the experiment's metric at each evaluation.
        final: all metrics of the last evaluation.
        loss: total loss, the median of the last records.
    """

    curve: list[tuple[int, float]]
    final: dict[str, float]
    loss: float | None


class Experiments:
    """A folder of experiments; what is there already is not run again.

    Args:
        root: the project's folder, with tools/ and configs/.
        output: the folder of the experiments; it may hold some of them.
        device: MODEL.DEVICE of all.
        jobs: how many run at the same time; on a CPU they share its cores.
    """

    def __init__(self, root: Path, output: Path, device: str, jobs: int = 1):
        self.root, self.output, self.device, self.jobs = root, output, device, jobs
        self._threads = max(1, available_cores() // jobs)

    def run(self, experiments: Sequence[Experiment]) -> dict[str, Outcome]:
        """Run those experiments that have not ended yet, and return the outcome of all.

        An interrupted one goes on from its last checkpoint. Progress is logged with an estimate of
        the time left.

        Args:
            experiments: none starts from another of the same call.

        Returns:
            dict[str, Outcome]: by name, in the order of ``experiments``.

        Raises:
            UsageError: if a folder holds an experiment of the same name with other settings, or an
                experiment is refused.
            RuntimeError: if one fails; it names the log, and what has ended is kept.
        """
        outcomes = {experiment.name: self._read(experiment) for experiment in experiments}
        missing = [experiment for experiment in experiments if outcomes[experiment.name] is None]
        logger.info("%d of %d experiments are to be run.", len(missing), len(experiments))
        for name in sorted({experiment.after for experiment in missing} - {""}):
            self._write_backbone(name)
        start = time.perf_counter()
        with ThreadPoolExecutor(self.jobs) as pool:
            running = {pool.submit(self._train, each): each for each in missing}
            try:
                for number, done in enumerate(as_completed(running), 1):
                    done.result()
                    outcomes[running[done].name] = self._read(running[done])
                    left = (time.perf_counter() - start) / number * (len(missing) - number)
                    logger.info(
                        "%d of %d experiments have ended, about %.0f min are left.",
                        *(number, len(missing), left / 60),
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return outcomes

    def checkpoint(self, name: str) -> Path:
        """Return the final checkpoint of an experiment that has ended."""
        return self._folder(name) / "model_final.pth"

    def _backbone(self, name: str) -> Path:
        return self._folder(name) / "backbone.pth"

    def _write_backbone(self, name: str) -> None:
        """Write the backbone of an experiment to a file that a detector can start from."""
        if not self._backbone(name).exists():
            convert_checkpoint(self.checkpoint(name), self._backbone(name))

    def _folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def _config_file(self, experiment: Experiment) -> str:
        return str(self.root / "configs" / experiment.config)

    def _settings(self, experiment: Experiment) -> dict[str, object]:
        cfg = load_config(self._config_file(experiment), list(experiment.overrides))
        return {
            "tool": experiment.tool,
            "config": experiment.config,
            "overrides": list(experiment.overrides),
            "sha256": hashlib.sha256(cfg.dump().encode()).hexdigest(),  # of the whole config
            "after": experiment.after,
        }

    def _read(self, experiment: Experiment) -> Outcome | None:
        record_file = self._folder(experiment.name) / _RECORD
        if not record_file.exists():
            return None
        record = json.loads(record_file.read_text())
        if record["settings"] != self._settings(experiment):
            raise UsageError(
                f"{record_file.parent} holds an experiment with other settings; name another "
                "output, or remove that folder."
            )
        curve = [tuple(point) for point in record["curve"]]
        return Outcome(curve, record["final"], record["loss"])

    def _train(self, experiment: Experiment) -> None:
        folder = self._folder(experiment.name)
        resume = (folder / "last_checkpoint").exists()
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # it was interrupted before its first checkpoint
        overrides = [*experiment.overrides, "MODEL.DEVICE", self.device]
        if experiment.after:
            overrides += ["MODEL.WEIGHTS", str(self._backbone(experiment.after))]
        command = [
            *(sys.executable, str(self.root / "tools" / f"{experiment.tool}.py")),
            *("--config-file", self._config_file(experiment)),
            *(["--resume"] if resume else []),
            *(*overrides, "OUTPUT_DIR", str(folder)),
        ]
        log = self.output / "logs" / f"{experiment.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s begins; its log is %s.", experiment.name, log)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        with log.open("w") as text:
            done = subprocess.run(
                command, stdout=text, stderr=subprocess.STDOUT, check=False, env=environment
            )
        if done.returncode == 2:  # a usage error is the last line
            reason = log.read_text().splitlines()[-1].removeprefix("error: ")
            raise UsageError(f"experiment {experiment.name}: {reason}")
        if done.returncode:
            raise RuntimeError(
                f"The experiment {experiment.name} failed with exit status {done.returncode}; its "
                f"log is {log}."
            )
        outcome = _outcome(folder / "metrics.json", experiment.metric)
        record = {"settings": self._settings(experiment), **vars(outcome)}
        write_text(folder / _RECORD, json.dumps(record, indent=2))


def _outcome(metrics: Path, metric: str) -> Outcome:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [record for record in records if metric in record]
    if not evaluations:
        raise RuntimeError(f"{metrics} has no {metric}: the training did not evaluate.")
    losses = [record["total_loss"] for record in records if "total_loss" in record][-5:]
    prefix = metric.split("/", 1)[0] + "/"
    last = evaluations[-1]
    return Outcome(
        # detectron2 counts from zero.
        [(record["iteration"] + 1, record[metric]) for record in evaluations],
        {key: value for key, value in last.items() if key.startswith(prefix)},
        sorted(losses)[len(losses) // 2] if losses else None,
    )


def overrides(values: Mapping[str, object]) -> tuple[str, ...]:
    """Return KEY VALUE pairs in one list, as commands take them."""
    pairs = ((key, v if isinstance(v, str) else repr(v)) for key, v in values.items())
    return tuple(word for pair in pairs for word in pair)
