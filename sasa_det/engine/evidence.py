"""The long comparison of attention with convolution on digits: equal budgets, tuned alike."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..analysis.complexity import count_config, total
from ..config.load import load_config
from ..evaluation.drawing import draw_mean_curves
from ..utils.files import write_text
from ..utils.machine import default_device, describe_machine
from .comparison import rates_table
from .defaults import log_to
from .experiments import Experiment, Experiments, Outcome, overrides
from .measured_steps import measure_steps

MODELS = {
    "convolution": "conv",
    "attention, convolutional stem": "SASA_conv_stem",
    "attention": "SASA",
}
STARTS = ("from scratch", "pretrained")
TWIN = "convolution"

# What a model with attention is compared with, from scratch: other keys, and rates of their own.
VARIED = "attention, convolutional stem"
VARIANTS = {
    "without q.k": {"MODEL.SASA.CONTENT": False},
    "without q.r": {"MODEL.SASA.POSITION": "none"},
    "batch norm on queries and keys, at the full rate": {
        "MODEL.SASA.QK_NORM": "BN",
        "SOLVER.LOGIT_LR_FACTOR": 1.0,
    },
}

# Rates of AdamW that are tried for every model; the best on held-out training data is taken.
DETECTOR_RATES = (0.003, 0.006, 0.012)
CLASSIFIER_RATES = (0.004, 0.008, 0.016)


@dataclass(frozen=True)
class Budget:
    """How much is spent on every model alike.

    Attributes:
        tuning_iterations: of the detectors that rates are chosen with.
        iterations: of the detectors that are compared.
        evaluations: of each of them, evenly spaced.
        seeds: of the runs that are compared; rates are chosen with the first.
    """

    tuning_iterations: int = 700
    iterations: int = 1500
    evaluations: int = 6
    seeds: tuple[int, ...] = (1, 2, 3)


def gather_evidence(root: Path, output: Path, jobs: int, budget: Budget) -> str:
    """Train all models with equal budgets and compare them; what is there is not run again.

    Args:
        root: the project's folder.
        output: folder of the runs; it receives evidence.md, evidence.json, curves.png, and in
            benchmark/ what a training step takes, measured when all trainings have ended.
        jobs: trainings at the same time.
        budget: of every model.

    Returns:
        str: the tables, as written to evidence.md.

    Raises:
        UsageError: if ``output`` holds runs with other settings.
        RuntimeError: if a training fails.
    """
    log_to(None)
    device = default_device()
    study = _Study(Experiments(root, output, device, jobs), budget)
    tried = study.choose_rates()
    finals = study.compare()
    variants = study.compare_variants()
    steps = measure_steps(root, output / "benchmark", device)
    rows = list(_rows(root, finals, steps))
    varied = list(_variant_rows(finals, variants))
    text = "\n\n".join(
        [
            *(tabulate(each, "keys", "github", disable_numparse=True) for each in (rows, varied)),
            rates_table(tried, "AP or top-1"),
            f"{budget.iterations} iterations with the seeds {', '.join(map(str, budget.seeds))}; "
            f"rates chosen with {budget.tuning_iterations} iterations and the first seed; on "
            f"{describe_machine(device)}, {jobs} trainings at a time.",
        ]
    )
    write_text(output / "evidence.md", text + "\n")
    record = {
        "rates": tried,
        "runs": {
            " | ".join(map(str, key)): vars(outcome)
            for key, outcome in [*finals.items(), *variants.items()]
        },
        "rows": rows,
        "variants": varied,
    }
    write_text(output / "evidence.json", json.dumps(record, indent=2))
    panels: dict[str, dict[str, list[list[tuple[int, float]]]]] = {}
    for (model, start, _), outcome in finals.items():
        panels.setdefault(start, {}).setdefault(model, []).append(outcome.curve)
    draw_mean_curves(panels, output / "curves.png", "Box AP on digits_val")
    return text


class _Study:
    """The experiments, and what was chosen from them."""

    def __init__(self, experiments: Experiments, budget: Budget):
        self._experiments, self._budget = experiments, budget
        self._classifier_rates: dict[str, float] = {}
        self._detector_rates: dict[tuple[str, str], float] = {}
        self._variant_rates: dict[str, float] = {}

    def choose_rates(self) -> dict[str, dict[float, float]]:
        """Choose every model's rates on held-out training data; return what each of them gave."""
        seed, iterations = self._budget.seeds[0], self._budget.tuning_iterations
        classifiers = {
            (model, rate): self._classifier(model, rate, seed, "digit_crops_tuning")
            for model in MODELS
            for rate in CLASSIFIER_RATES
        }
        of_classifiers, self._classifier_rates = self._try(classifiers)
        detectors = {
            ((model, start), rate): self._detector(
                *(model, start, rate, seed, "digits_tuning", iterations, 1),
                after=classifiers[model, self._classifier_rates[model]].name,
            )
            for model in MODELS
            for start in STARTS
            for rate in DETECTOR_RATES
        }
        of_detectors, self._detector_rates = self._try(detectors)
        variants = {
            (variant, rate): self._variant(variant, rate, seed, "digits_tuning", iterations, 1)
            for variant in VARIANTS
            for rate in DETECTOR_RATES
        }
        of_variants, self._variant_rates = self._try(variants)
        return {
            **{f"classifier, {model}": values for model, values in of_classifiers.items()},
            **{f"{model}, {start}": values for (model, start), values in of_detectors.items()},
            **{f"{VARIED}, {variant}": values for variant, values in of_variants.items()},
        }

    def _try(
        self, planned: Mapping[tuple[Any, float], Experiment]
    ) -> tuple[dict[Any, dict[float, float]], dict[Any, float]]:
        """Run experiments by what they are of and rate; return all results, and the best rates."""
        results = self._experiments.run(list(planned.values()))
        tried: dict[Any, dict[float, float]] = {}
        for (of, rate), experiment in planned.items():
            tried.setdefault(of, {})[rate] = _last(results[experiment.name])
        return tried, {of: max(values, key=values.get) for of, values in tried.items()}

    def compare(self) -> dict[tuple[str, str, int], Outcome]:
        """Train with the chosen rates; return the outcomes by model, start and seed."""
        seeds, budget = self._budget.seeds, self._budget
        classifiers = {
            (model, seed): self._classifier(
                model, self._classifier_rates[model], seed, "digit_crops"
            )
            for model in MODELS
            for seed in seeds
        }
        self._experiments.run(list(classifiers.values()))
        detectors = {
            (model, start, seed): self._detector(
                *(model, start, self._detector_rates[model, start], seed, "digits"),
                *(budget.iterations, budget.evaluations),
                after=classifiers[model, seed].name,
            )
            for seed in seeds
            for start in STARTS
            for model in MODELS
        }
        results = self._experiments.run(list(detectors.values()))
        return {key: results[experiment.name] for key, experiment in detectors.items()}

    def compare_variants(self) -> dict[tuple[str, int], Outcome]:
        """Train the variants with the rates chosen; return the outcomes by variant and seed."""
        budget = self._budget
        planned = {
            (variant, seed): self._variant(
                *(variant, self._variant_rates[variant], seed, "digits"),
                *(budget.iterations, budget.evaluations),
            )
            for seed in budget.seeds
            for variant in VARIANTS
        }
        results = self._experiments.run(list(planned.values()))
        return {key: results[experiment.name] for key, experiment in planned.items()}

    def _variant(
        self, variant: str, rate: float, seed: int, data: str, iterations: int, evaluations: int
    ) -> Experiment:
        base = self._detector(VARIED, STARTS[0], rate, seed, data, iterations, evaluations)
        name = re.sub(r"[^\w.]+", "-", variant)
        return replace(
            base,
            name=base.name.replace(STARTS[0].replace(" ", "-"), name),
            overrides=(*base.overrides, *overrides(VARIANTS[variant])),
        )

    def _classifier(self, model: str, rate: float, seed: int, data: str) -> Experiment:
        values = {"SOLVER.BASE_LR": rate, **_on(data, seed)}
        return Experiment(
            f"classifier {MODELS[model]} {data} {rate} {seed}".replace(" ", "-"),
            "train_imagenet",
            f"Digits/classifier_{MODELS[model]}.yaml",
            overrides(values),
            "classification/top1",
        )

    def _detector(
        self,
        model: str,
        start: str,
        rate: float,
        seed: int,
        data: str,
        iterations: int,
        evaluations: int,
        after: str = "",
    ) -> Experiment:
        values = {
            "SOLVER.BASE_LR": rate,
            "SOLVER.MAX_ITER": iterations,
            "TEST.EVAL_PERIOD": iterations // evaluations,
            **_on(data, seed),
        }
        return Experiment(
            f"detector {MODELS[model]} {start} {data} {rate} {seed}".replace(" ", "-"),
            "train_net",
            f"Digits/retinanet_{MODELS[model]}.yaml",
            overrides(values),
            after=after if start == "pretrained" else "",
        )


def _on(data: str, seed: int) -> dict[str, object]:
    return {
        "DATASETS.TRAIN": (f"{data}_train",),
        "DATASETS.TEST": (f"{data}_val",),
        "DATALOADER.NUM_WORKERS": 0,
        "SEED": seed,
    }


def _last(outcome: Outcome) -> float:
    return outcome.curve[-1][1]


def _rows(
    root: Path,
    finals: Mapping[tuple[str, str, int], Outcome],
    steps: Mapping[str, tuple[float, float]],
) -> Iterator[dict[str, str]]:
    def values(model: str, start: str, metric: str) -> list[float]:
        return [
            outcome.final[metric]
            for (m, s, _), outcome in sorted(finals.items())
            if (m, s) == (model, start)
        ]

    for start in STARTS:
        for model, kind in MODELS.items():
            ap, twin = (values(each, start, "bbox/AP") for each in (model, TWIN))
            cfg = load_config(str(root / f"configs/Digits/retinanet_{kind}.yaml"), [])
            parts = total(count_config(cfg, *[cfg.INPUT.MIN_SIZE_TEST] * 2))
            yield {
                "model": f"{model}, {start}",
                "AP": mean_and_spread(ap),
                "AP50": mean_and_spread(values(model, start, "bbox/AP50")),
                "AP minus twin's": ""
                if model == TWIN
                else mean_and_spread([a - b for a, b in zip(ap, twin, strict=True)], "+"),
                "params (M)": f"{parts.parameters / 1e6:.2f}",
                "FLOPs (B)": f"{parts.flops / 1e9:.2f}",
                "training step (ms)": f"{1e3 * steps[model][0]:.0f}",
                "its memory (MiB)": f"{steps[model][1]:.0f}",
            }


def _variant_rows(
    finals: Mapping[tuple[str, str, int], Outcome], variants: Mapping[tuple[str, int], Outcome]
) -> Iterator[dict[str, str]]:
    outcomes = {(VARIED, seed): each for (m, s, seed), each in finals.items()
                if (m, s) == (VARIED, STARTS[0])} | dict(variants)  # fmt: skip
    aps: dict[str, list[float]] = {}
    for (name, _), outcome in sorted(outcomes.items(), key=lambda item: item[0][1]):
        aps.setdefault(name, []).append(outcome.final["bbox/AP"])
    for name, ap in aps.items():
        gained = [a - b for a, b in zip(ap, aps[VARIED], strict=True)]
        yield {
            f"{STARTS[0]}": name,
            "AP": mean_and_spread(ap),
            "minus the first row": "" if name == VARIED else mean_and_spread(gained, "+"),
        }


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Return "mean ± standard deviation" of a few values, with one decimal."""
    text = f"{statistics.mean(values):{sign}.1f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.1f}"
