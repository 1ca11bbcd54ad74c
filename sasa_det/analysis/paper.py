"""The models of the paper's tables and of its Figure 5, counted from their configs."""

import json
import os
from pathlib import Path
from typing import Any

from ..config.load import load_config
from ..errors import UsageError, nearest
from .complexity import Part, count_config, default_image_size, markdown, total
from .cost_figure import CostedModel, draw_cost_figure
from .paper_tables import ABLATIONS, PAPER_TABLES, Row, Table


def count_row(configs: Path, table: Table, row: Row) -> Part:
    """Count a model of a table of the paper, on the table's size of image.

    Args:
        configs: the folder of all configs.
        table: of the paper.
        row: one of its rows.

    Returns:
        Part: the whole model.
    """
    cfg = load_config(str(_path(configs, table, row)), row.opts)
    return total(count_config(cfg, table.size, table.size))


def paper_report(configs: Path) -> str:
    """Tabulate Tables 1 to 7 and Figure 5 of the paper beside what this code counts.

    Args:
        configs: the folder of all configs.

    Returns:
        str: tables in Markdown.
    """
    return "\n\n".join(
        f"{name}: {table.title}\n\n{_table_report(configs, table)}"
        for name, table in PAPER_TABLES.items()
    )


def _table_report(configs: Path, table: Table) -> str:
    rows = []
    for row in table.rows:
        count = count_row(configs, table, row)
        flops = (row.flops, f"{count.flops / 1e9:.2f}")
        parameters = (row.parameters, f"{count.parameters / 1e6:.2f}")
        rows.append((f"{row.name} {row.series}".rstrip(), *flops, *parameters, row.accuracy))
    headers = ("model", "FLOPs (B), paper", "counted", "params (M), paper", "counted")
    return markdown(rows, (*headers, f"{table.metric}, paper"))


def draw_figure_5(
    configs: Path, output: Path, results: Path | None = None, *, overwrite: bool = False
) -> str:
    """Draw top-1 accuracies against FLOPs and against parameters, and tabulate what is drawn.

    The accuracies are those that Table 1 prints and those of ``results``. The paper prints none for
    the widths of Figure 5: only their costs are drawn.

    Args:
        configs: the folder of all configs.
        output: the PNG to write.
        results: a JSON object of top-1 accuracies in percent, by the names of ablation configs or
            the paths of other classifiers' configs; None for none.
        overwrite: whether ``output`` may exist.

    Returns:
        str: a table in Markdown.

    Raises:
        UsageError: if ``output`` exists or cannot be written, or ``results`` cannot be used.
    """
    _check_output(output, overwrite)
    measured = {} if results is None else _read_results(results, configs)
    rows = {
        _path(configs, table, row).resolve(): (table, row)
        for table in (PAPER_TABLES["Table 1"], PAPER_TABLES["Figure 5"])
        for row in table.rows
    }
    others = [
        _other_model(path, top1, results) for path, top1 in measured.items() if path not in rows
    ]
    models = []
    for path, (table, row) in rows.items():
        count = count_row(configs, table, row)
        costs = (count.flops, count.parameters)
        models.append(CostedModel(row.name, row.series, *costs, row.accuracy, measured.get(path)))
    models += others
    try:
        draw_cost_figure(models, output)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}.") from error
    lines = [
        (
            f"{model.name} {model.series}".rstrip(),
            f"{model.flops / 1e9:.2f}",
            f"{model.parameters / 1e6:.2f}",
            model.printed,
            "" if model.measured is None else f"{model.measured:.1f}",
        )
        for model in models
    ]
    headers = ["model", "FLOPs (B)", "params (M)", "top-1, paper", "top-1, results"]
    return markdown(lines, headers)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".png":
        raise UsageError(f"--output {output} must end in .png.")
    if os.path.lexists(output) and not overwrite:
        raise UsageError(f"--output {output} exists; it is replaced with --overwrite only.")
    if output.is_dir():
        raise UsageError(f"--output {output} cannot be written: it is a folder.")
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"--output {output} cannot be written: {folder} is not a folder that can be written to."
        )


def _path(configs: Path, table: Table, row: Row) -> Path:
    return configs / table.folder / f"{row.config}.yaml"


def _other_model(path: Path, top1: float, results: Path) -> CostedModel:
    cfg = load_config(str(path))
    if cfg.MODEL.META_ARCHITECTURE != "Classifier":
        raise UsageError(
            f"{results}: {path} must be the config of a classifier, with MODEL.META_ARCHITECTURE "
            f"Classifier, got {cfg.MODEL.META_ARCHITECTURE}."
        )
    count = total(count_config(cfg, *default_image_size(cfg)))
    return CostedModel(path.stem, "", count.flops, count.parameters, measured=top1)


def _read_results(file: Path, configs: Path) -> dict[Path, float]:
    """Read top-1 accuracies by the configs' real paths."""
    results: dict[Path, float] = {}
    for name, top1 in _read_pairs(file):
        if isinstance(top1, bool) or not isinstance(top1, int | float) or not 0 <= top1 <= 100:
            raise UsageError(
                f"{file}: the top-1 accuracy of {name!r} must be a number of percent from 0 to "
                f"100, got {top1!r}."
            )
        path = _find_config(name, file, configs)
        if path in results:
            raise UsageError(f"{file}: {name!r} names a config for the second time.")
        results[path] = top1
    return results


def _read_pairs(file: Path) -> tuple[tuple[str, Any], ...]:
    try:
        with open(file, encoding="utf-8") as opened:
            content = json.load(opened, object_pairs_hook=tuple)
    except OSError as error:
        raise UsageError(f"results file {file} cannot be read: {error.strerror}.") from error
    # A UnicodeDecodeError is a ValueError, as json's own error is.
    except ValueError as error:
        raise UsageError(f"results file {file} is not JSON: {error}.") from error
    except RecursionError as error:
        raise UsageError(f"results file {file} is nested too deeply.") from error
    if not isinstance(content, tuple):
        raise UsageError(
            f"results file {file} must hold a JSON object of top-1 accuracies by config, holds a "
            f"{type(content).__name__}."
        )
    return content


def _find_config(name: str, file: Path, configs: Path) -> Path:
    paths = {
        row.config: _path(configs, table, row)
        for table in PAPER_TABLES.values()
        for row in table.rows
        if table.folder == ABLATIONS
    }
    path = paths.get(name, Path(name))
    if path.suffix != ".yaml" or not path.is_file():
        raise UsageError(
            f"{file}: {name!r} must be the path of a classifier's .yaml file or one of the "
            f"configs {', '.join(paths)}{nearest(name, paths)}"
        )
    return path.resolve()
