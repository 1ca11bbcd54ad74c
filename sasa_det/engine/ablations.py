"""Ablations, the paper's and our own, on a classification task that is small enough to run here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from ..analysis.paper_tables import PAPER_TABLES, Row, Table
from ..config.keys import flatten
from ..config.load import load_config
from ..config.yaml_file import read_config_file
from ..data.image_folder import check_image_folders
from ..errors import UsageError
from ..utils.files import write_text
from ..utils.machine import default_device, describe_machine
from .defaults import log_to
from .experiments import Experiment, Experiments, overrides
from .studies import STUDIES, difference, run_study, standard_error, study_report


@dataclass(frozen=True)
class Finding:
    """What the paper concludes from a table: one row is better than another."""

    text: str
    better: str
    worse: str


FINDINGS = {
    "Table 3": (
        Finding("Attention in the last two groups is better than in the first two.",
                "groups 3, 4", "groups 1, 2"),
        Finding("Attention in the last group is better than in the first.", "group 4", "group 1"),
        Finding("Convolution in the first group and attention in the rest is better than "
                "attention in all.", "groups 2, 3, 4", "groups 1, 2, 3, 4"),
        Finding("Attention in all groups is better than convolution.",
                "groups 1, 2, 3, 4", "none"),
    ),
    "Table 4": (
        Finding("A window of 7 x 7 is better than one of 3 x 3.", "7 x 7", "3 x 3"),
        Finding("A window of 11 x 11 is better than one of 7 x 7.", "11 x 11", "7 x 7"),
    ),
    "Table 5": (
        Finding("Relative positions are better than absolute ones.", "relative", "absolute"),
        Finding("Absolute positions are better than none.", "absolute", "none"),
        Finding("Relative positions are better than none.", "relative", "none"),
    ),
    "Table 6": (
        Finding("q.k adds to q.r.", "q.k + q.r", "q.r"),
    ),
    "Table 7": (
        Finding("Spatially aware values are better than stand-alone attention.",
                "spatially aware values", "stand-alone"),
        Finding("A spatial convolution for values is better than stand-alone attention.",
                "spatial convolution for values", "stand-alone"),
        Finding("Spatially aware values are better than a spatial convolution for values.",
                "spatially aware values", "spatial convolution for values"),
    ),
}  # fmt: skip


def run_ablations(
    root: Path,
    output: Path,
    tables: Sequence[str],
    config: str,
    opts: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
) -> str:
    """Train a small classifier for every row of some tables, and compare.

    Args:
        root: the project's folder.
        output: folder of the runs; what is there is not run again. It receives ablations.md and
            ablations.json.
        tables: numbers of tables of the paper, of :data:`FINDINGS`, and names of
            :data:`~sasa_det.engine.studies.STUDIES`.
        config: of the small classifier, relative to the folder of configs; a row changes in it
            what the row's config changes in the paper's model.
        opts: KEY VALUE pairs for all runs.
        seeds: of the runs of each row.
        jobs: trainings at the same time.

    Returns:
        str: the tables, as written to ablations.md.

    Raises:
        UsageError: if a table is not known or ``output`` holds runs with other settings.
        DatasetError, FileNotFoundError: if the config's data are not there or cannot be used.
        RuntimeError: if a training fails.
    """
    log_to(None)
    chosen = [_table(number) for number in tables if number not in STUDIES]
    data = load_config(str(root / "configs" / config), list(opts)).DATASETS
    check_image_folders((*data.TRAIN, *data.TEST))  # here, and not in the first training
    device = default_device()
    experiments = Experiments(root, output, device, jobs)
    results = _run_tables(root, chosen, experiments, config, opts, seeds)
    texts = [_report(name, table, results[name]) for name, table in chosen]
    tried = {}
    for name in tables:
        if name in STUDIES:
            found = run_study(STUDIES[name], experiments, config, opts, seeds)
            texts.append(study_report(STUDIES[name], found))
            results[name], tried[name] = found.top1, found.tried
    notes = f"{config}, seeds {', '.join(map(str, seeds))}, on {describe_machine(device)}."
    text = "\n\n".join([*texts, notes])
    write_text(output / "ablations.md", text + "\n")
    record = {"config": config, "opts": list(opts), "seeds": list(seeds), "top1": results}
    write_text(output / "ablations.json", json.dumps({**record, "rates": tried}, indent=2))
    return text


def _run_tables(
    root: Path,
    tables: Sequence[tuple[str, Table]],
    experiments: Experiments,
    config: str,
    opts: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    """Return the top-1 of the seeds, by table and row."""
    planned = {
        (name, row.name, seed): _experiment(root, name, table, row, seed, config, opts)
        for seed in seeds  # the first seed of all rows first
        for name, table in tables
        for row in table.rows
    }
    outcomes = experiments.run(list(planned.values())) if planned else {}
    results: dict[str, dict[str, list[float]]] = {}
    for (name, row, _), experiment in planned.items():
        top1 = outcomes[experiment.name].curve[-1][1]
        results.setdefault(name, {}).setdefault(row, []).append(top1)
    return results


def _table(number: str) -> tuple[str, Table]:
    name = f"Table {number}"
    if name not in FINDINGS:
        known = [*(each.removeprefix("Table ") for each in FINDINGS), *STUDIES]
        raise UsageError(f"--tables {number!r} must be of {', '.join(known)}.")
    return name, PAPER_TABLES[name]


def _experiment(
    root: Path, name: str, table: Table, row: Row, seed: int, config: str, opts: Sequence[str]
) -> Experiment:
    folder = root / "configs" / table.folder
    # The rows that are the paper's base say nothing of what the others change.
    keys = {key for each in table.rows for key in _changed(folder / f"{each.config}.yaml")}
    papers = flatten(load_config(str(folder / f"{row.config}.yaml")))
    changes = {key: papers[key] for key in sorted(keys)}
    return Experiment(
        f"{row.config}-{seed}",
        "train_imagenet",
        config,
        (*opts, *overrides({**changes, "SEED": seed, "DATALOADER.NUM_WORKERS": 0})),
        "classification/top1",
    )


def _changed(config: Path) -> set[str]:
    _, values = read_config_file(str(config))[-1]
    return set(flatten(values)) - {"OUTPUT_DIR"}


def _report(name: str, table: Table, results: Mapping[str, Sequence[float]]) -> str:
    rows = [
        [row.name, f"{row.accuracy:.1f}", statistics.mean(results[row.name]),
         _spread(results[row.name])]
        for row in table.rows
    ]  # fmt: skip
    headers = [name, f"{table.metric}, paper", "top-1 here", "standard deviation"]
    printed = tabulate(rows, headers, tablefmt="github", floatfmt=".1f")
    findings = [
        [finding.text, verdict(results[finding.better], results[finding.worse])]
        for finding in FINDINGS[name]
    ]
    headers = ["the paper's finding", "here"]
    return f"{printed}\n\n{tabulate(findings, headers, tablefmt='github')}"


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def verdict(better: Sequence[float], worse: Sequence[float]) -> str:
    """Say whether one row is better than another, beyond what seeds account for.

    A difference of means counts if it is more than twice its standard error.

    Args:
        better, worse: top-1 of the seeds of each row.

    Returns:
        str: "holds", "does not hold: the opposite" or "not decided", with the difference.
    """
    gained = statistics.mean(better) - statistics.mean(worse)
    text = difference(better, worse)
    if len(better) < 2 or len(worse) < 2:
        return f"not decided by one seed ({text})"
    if abs(gained) <= 2 * standard_error(better, worse):
        return f"not decided ({text})"
    return f"holds ({text})" if gained > 0 else f"the opposite holds ({text})"
