"""Ablations, the paper's and our own, on a classification task that is small enough to run here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from ..analysis.paper_tables import PAPER_TABLES, Row, Table
from ..analysis.san_paper import SAN_RELATIONS
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

# The small classifiers whose keys the rows change. A SAN needs long to tell digits apart.
_SASA_CONFIG = "Digits/classifier_SASA_conv_stem.yaml"
_SAN_CONFIG = "Animals/classifier_SAN_pairwise.yaml"


@dataclass(frozen=True)
class Finding:
    """What a paper concludes from a table, or why it chose a row: it is better than another."""

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
    "san_relations": (
        Finding("The paper's patchwise model is better than its pairwise model.",
                "patchwise, concatenation", "pairwise, subtraction"),
        *(Finding(f"Subtraction, as in the paper's pairwise models, is better than {other}.",
                  "pairwise, subtraction", f"pairwise, {other}")
          for other in ("summation", "concatenation", "Hadamard product", "dot product")),
        *(Finding(f"Concatenation, as in the paper's patchwise models, is better than {other}.",
                  "patchwise, concatenation", f"patchwise, {other}")
          for other in ("star product", "clique product")),
    ),
}  # fmt: skip

TABLES = {**PAPER_TABLES, "san_relations": SAN_RELATIONS}


def run_ablations(
    root: Path,
    output: Path,
    tables: Sequence[str],
    config: str | None,
    opts: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
) -> str:
    """Train a small classifier for every row of some tables, and compare.

    Args:
        root: the project's folder.
        output: folder of the runs; what is there is not run again. It receives ablations.md and
            ablations.json.
        tables: numbers of tables of the paper, of :data:`FINDINGS`, san_relations, and names of
            :data:`~sasa_det.engine.studies.STUDIES`.
        config: of the small classifier, relative to the folder of configs; a row changes in it
            what the row's config changes in the paper's model. None for a
            classifier of digits, and for san_relations of silhouettes of animals.
        opts: KEY VALUE pairs for all runs.
        seeds: of the runs of each row.
        jobs: trainings at the same time.

    Returns:
        str: the tables, as written to ablations.md.

    Raises:
        UsageError: if a table is not known, the classifier has another backbone than its rows, or
            ``output`` holds runs with other settings.
        DatasetError, FileNotFoundError: if the config's data are not there or cannot be used.
        RuntimeError: if a training fails.
    """
    log_to(None)
    chosen = [_table(number) for number in tables if number not in STUDIES]
    names = [*dict(chosen), *(name for name in tables if name in STUDIES)]
    configs = {name: config or _default_config(name) for name in names}
    used = list(dict.fromkeys(configs.values()))
    for each in used:
        data = load_config(str(root / "configs" / each), list(opts)).DATASETS
        check_image_folders((*data.TRAIN, *data.TEST))  # here, and not in the first training
    for name, table in chosen:
        _check_backbone(root, name, table, configs[name])
    device = default_device()
    experiments = Experiments(root, output, device, jobs)
    results = _run_tables(root, chosen, experiments, configs, opts, seeds)
    texts = [_report(name, table, results[name]) for name, table in chosen]
    tried = {}
    for name in tables:
        if name in STUDIES:
            found = run_study(STUDIES[name], experiments, configs[name], opts, seeds)
            texts.append(study_report(STUDIES[name], found))
            results[name], tried[name] = found.top1, found.tried
    notes = f"{', '.join(used)}; seeds {', '.join(map(str, seeds))}, on {describe_machine(device)}."
    text = "\n\n".join([*texts, notes])
    write_text(output / "ablations.md", text + "\n")
    record = {"configs": configs, "opts": list(opts), "seeds": list(seeds), "top1": results}
    write_text(output / "ablations.json", json.dumps({**record, "rates": tried}, indent=2))
    return text


def _default_config(table: str) -> str:
    return _SAN_CONFIG if table == "san_relations" else _SASA_CONFIG


def _check_backbone(root: Path, name: str, table: Table, config: str) -> None:
    """Raise UsageError if a classifier does not read the keys that the rows of a table change."""
    row = root / "configs" / table.folder / f"{table.rows[0].config}.yaml"
    backbone, needed = (
        load_config(str(file)).MODEL.BACKBONE.NAME for file in (root / "configs" / config, row)
    )
    if backbone != needed:
        raise UsageError(
            f"--tables {name.removeprefix('Table ')} needs a classifier with MODEL.BACKBONE.NAME "
            f"{needed}, and {config} has {backbone}."
        )


def _run_tables(
    root: Path,
    tables: Sequence[tuple[str, Table]],
    experiments: Experiments,
    configs: Mapping[str, str],
    opts: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, dict[str, list[float]]]:
    """Return the top-1 of the seeds, by table and row."""
    planned = {
        (name, row.name, seed): _experiment(root, table, row, seed, configs[name], opts)
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
    name = f"Table {number}" if number.isdigit() else number
    if name not in FINDINGS:
        known = [*(each.removeprefix("Table ") for each in FINDINGS), *STUDIES]
        raise UsageError(f"--tables {number!r} must be of {', '.join(known)}.")
    return name, TABLES[name]


def _experiment(
    root: Path, table: Table, row: Row, seed: int, config: str, opts: Sequence[str]
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
        [row.name, row.accuracy, statistics.mean(results[row.name]),
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
