"""What the paper does not compare: how to keep q.k from saturating, and optimizers.

Every row is the small classifier with other keys. Each has its own learning rate, the best of three
on held-out training images.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from ..config.load import load_config
from .comparison import rates_table
from .experiments import Experiment, Experiments, overrides

METRIC = "classification/top1"
ADAMW_RATES = (0.004, 0.008, 0.016)
# The paper's 1.6 for a batch of 4096 is 0.0125 for one of 32.
NAG_RATES = (0.01, 0.03, 0.1)

# Whatever queries and keys do, the linear layer learns as slowly as in the configs.
_ADAMW = {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.LINEAR_LR_FACTOR": 0.05}
_SLOW_RATE = {**_ADAMW, "SOLVER.LOGIT_LR_FACTOR": 0.05}
_FULL_RATE = {**_ADAMW, "SOLVER.LOGIT_LR_FACTOR": 1.0}
# The paper's, whose steps have the size of the gradient, so that no weight needs another rate; the
# decay is that of ResNet, as in configs/ImageNet.
_NAG = {
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.NESTEROV": True,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.LOGIT_LR_FACTOR": 1.0,
    "SOLVER.LINEAR_LR_FACTOR": 1.0,
}


@dataclass(frozen=True)
class Variant:
    """A row of a study.

    Attributes:
        name: what the row is about; variants of the same name are the same in all studies.
        changes: values by config key.
        rates: values of ``SOLVER.BASE_LR`` to choose from.
    """

    name: str
    changes: Mapping[str, Any] = field(hash=False)
    rates: tuple[float, ...] = ADAMW_RATES


@dataclass(frozen=True)
class Study:
    """Variants that are compared with the first of them."""

    title: str
    variants: tuple[Variant, ...]


def _at_full_rate(name: str, key: str, value: Any) -> Variant:
    return Variant(f"full rate, {name}", {**_FULL_RATE, key: value})


_SLOW = Variant("AdamW, a twentieth of the rate", _SLOW_RATE)
_FULL = Variant("AdamW, full rate", _FULL_RATE)

STUDIES = {
    "logits": Study(
        "queries and keys",
        (
            _SLOW,
            _FULL,
            _at_full_rate("batch norm", "MODEL.SASA.QK_NORM", "BN"),
            _at_full_rate("RMS norm", "MODEL.SASA.QK_NORM", "RMS"),
            _at_full_rate("cosine", "MODEL.SASA.QK_NORM", "cosine"),
            _at_full_rate("logits over the root of d", "MODEL.SASA.SCALE_LOGITS", True),
            # Half of the run's 375 iterations.
            _at_full_rate("warmup", "SOLVER.LOGIT_WARMUP_ITERS", 188),
            _at_full_rate("weight decay of 2", "SOLVER.WEIGHT_DECAY_LOGIT", 2.0),
            Variant("no q.k", {**_SLOW_RATE, "MODEL.SASA.CONTENT": False}),
        ),
    ),
    "optimizers": Study(
        "optimizer, rate of queries and keys",
        (
            _SLOW,
            _FULL,
            Variant("NAG, full rate", _NAG, NAG_RATES),
            Variant(
                "NAG, a twentieth of the rate", {**_NAG, "SOLVER.LOGIT_LR_FACTOR": 0.05}, NAG_RATES
            ),
        ),
    ),
}


@dataclass
class StudyResults:
    """What a study came to.

    Attributes:
        tried: top-1 on held-out training images by variant and learning rate, of the first seed.
        top1: by variant, of the seeds, with the best of these rates.
        runs: names of the experiments that these are of.
    """

    tried: dict[str, dict[float, float]]
    top1: dict[str, list[float]]
    runs: dict[str, list[str]]


def run_study(
    study: Study,
    experiments: Experiments,
    config: str,
    opts: Sequence[str],
    seeds: Sequence[int],
) -> StudyResults:
    """Choose a learning rate for each variant, and train with it and each seed.

    Args:
        study: the variants.
        experiments: the folder of the runs; what is there is not run again.
        config: of the classifier, relative to the folder of configs; its data set NAME_train has a
            NAME_tuning_train beside it.
        opts: KEY VALUE pairs for all runs.
        seeds: of the runs that are compared; rates are chosen with the first.

    Raises:
        UsageError: if the folder holds runs with other settings.
        RuntimeError: if a training fails.
    """

    def train(planned: Mapping[tuple[str, Any], Experiment]) -> dict[tuple[str, Any], float]:
        outcomes = experiments.run(list(planned.values()))
        return {key: outcomes[each.name].curve[-1][1] for key, each in planned.items()}

    cfg = load_config(str(experiments.root / "configs" / config), list(opts))
    data = cfg.DATASETS.TRAIN[0].removesuffix("_train")

    def experiment(variant: Variant, data: str, rate: float, seed: int) -> Experiment:
        return _experiment(variant, data, rate, seed, config, opts)

    found = train(
        {
            (variant.name, rate): experiment(variant, f"{data}_tuning", rate, seeds[0])
            for variant in study.variants
            for rate in variant.rates
        }
    )
    tried = {v.name: {rate: found[v.name, rate] for rate in v.rates} for v in study.variants}
    best = {name: max(values, key=values.get) for name, values in tried.items()}
    compared = {
        (variant.name, seed): experiment(variant, data, best[variant.name], seed)
        for seed in seeds  # the first seed of all variants first
        for variant in study.variants
    }
    found = train(compared)
    top1 = {v.name: [found[v.name, seed] for seed in seeds] for v in study.variants}
    runs = {v.name: [compared[v.name, seed].name for seed in seeds] for v in study.variants}
    return StudyResults(tried, top1, runs)


def _experiment(
    variant: Variant, data: str, rate: float, seed: int, config: str, opts: Sequence[str]
) -> Experiment:
    values = {
        **variant.changes,
        "SOLVER.BASE_LR": rate,
        "DATASETS.TRAIN": (f"{data}_train",),
        "DATASETS.TEST": (f"{data}_val",),
        "SEED": seed,
        "DATALOADER.NUM_WORKERS": 0,
    }
    folder = re.sub(r"[^\w.]+", "-", f"{variant.name} {data} {rate} {seed}")
    return Experiment(folder, "train_imagenet", config, (*opts, *overrides(values)), METRIC)


def study_report(study: Study, results: StudyResults) -> str:
    """Return the tables of a study in Markdown: the variants, and the rates that were tried."""
    first = results.top1[study.variants[0].name]
    rows = []
    for name, top1 in results.top1.items():
        spread = f"{statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        gained = "" if top1 is first else difference(top1, first)
        values = ", ".join(f"{value:.1f}" for value in top1)
        rows.append([name, f"{statistics.mean(top1):.1f}", values, spread, gained])
    headers = [study.title, "top-1", "of the seeds", "standard deviation", "minus the first row"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{rates_table(results.tried, 'top-1')}"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the difference of two means and, of several seeds, its standard error."""
    text = f"{statistics.mean(values) - statistics.mean(others):+.1f}"
    if min(len(values), len(others)) < 2:
        return text
    return f"{text} ± {standard_error(values, others):.1f}"


def standard_error(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the standard error of the difference of the means of two samples."""
    return sum(statistics.variance(each) / len(each) for each in (values, others)) ** 0.5
