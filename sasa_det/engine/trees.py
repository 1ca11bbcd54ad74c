"""Attention beside convolution on aerial photographs of trees, with equal budgets."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from ..analysis.complexity import count_config, total
from ..config.load import load_config
from ..data.catalog import builtin_path
from ..data.coco import box_corners, check_coco, load_coco
from ..data.images import MAX_PIXELS, read_image
from ..data.sources import open_data
from ..data.tiling import Tile, tile_image
from ..data.trees import fetch_trees
from ..data.validation_report import describe_report
from ..errors import UsageError
from ..evaluation.drawing import draw_curves, draw_detections
from ..utils.files import write_text
from ..utils.machine import default_device, describe_machine
from .comparison import comparison_table
from .defaults import log_to
from .evidence import MODELS
from .experiments import Experiment, Experiments, Outcome, overrides
from .tile_data import ANNOTATIONS, IMAGES, write_tiles

logger = logging.getLogger("sasa_det")

TILE_SIZE, OVERLAP, MIN_VISIBLE = 448, 0.5, 0.4
TURNS = (0, 1, 2, 3)

# Of the height of the training photograph: rates are chosen on what is above. Further below, boxes
# lie beside the crowns that they mean.
HELD_OUT = 0.25

# Of the trainings that rates are chosen with.
TUNING_ITERATIONS = 600

# Of AdamW, for models that have been trained on other data.
RATES = (0.0015, 0.003, 0.006)

# The lowest score of the detections that are drawn; what is measured does not depend on it.
DRAWN_SCORE = 0.5

# As the words after --train: COCO json and image folder, or a folder of Pascal VOC and "".
_Data = tuple[str, str]


def compare_on_trees(
    root: Path,
    output: Path,
    jobs: int,
    opts: Sequence[str] = (),
    photographs: str | Path | None = None,
) -> str:
    """Train all models on one photograph and evaluate them on another one.

    What is there is not run again, and what was interrupted goes on.

    Args:
        root: the project's folder.
        output: folder of the runs; it receives the tiles, results.md, results.json, curves.png and
            a picture of the whole test photograph for each model.
        jobs: trainings at the same time.
        opts: config overrides for all models, KEY VALUE pairs.
        photographs: folder with train/ and test/; those of :func:`fetch_trees` by default, which
            are fetched if they are not there.

    Returns:
        str: the results, as written to results.md.

    Raises:
        UsageError: if ``output`` holds runs or tiles with other settings.
        DatasetError: if the photographs cannot be fetched or used.
        RuntimeError: if a training fails.
    """
    train, test = _begin(photographs)
    tiles = _tiled(train, output / "tiles", _tiles, TURNS)
    device = default_device()
    experiments = Experiments(root, output, device, jobs)
    planned = {label: _experiment(kind, kind, tiles, test, opts) for label, kind in MODELS.items()}
    outcomes = experiments.run(list(planned.values()))
    rows = []
    for label, experiment in planned.items():
        folder = experiments.checkpoint(experiment.name).parent
        rows.append(_row(label, experiment, outcomes[experiment.name], root, folder))
        _draw(test, folder, output / f"detections_{experiment.name}.png")
    metrics = {
        label: experiments.checkpoint(each.name).parent / "metrics.json"
        for label, each in planned.items()
    }
    draw_curves(metrics, output / "curves.png")
    cfg = _config(root, next(iter(planned.values())))
    text = f"{comparison_table(rows)}\n\n" + (
        f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} crops of "
        f"{cfg.INPUT.JITTER.CROP_SIZE} x {cfg.INPUT.JITTER.CROP_SIZE} pixels, from detectors of "
        "digits; AP on the whole test photograph; FLOPs of a crop, a multiply-add being 2; on "
        f"{describe_machine(device)}, {jobs} trainings at a time."
    )
    write_text(output / "results.md", text + "\n")
    curves = {label: outcomes[each.name].curve for label, each in planned.items()}
    write_text(output / "results.json", json.dumps({"rows": rows, "AP": curves}, indent=2))
    return f"{text}\n\nCurves and pictures of the test photograph: {output}"


def tune_on_trees(
    root: Path,
    output: Path,
    jobs: int,
    opts: Sequence[str] = (),
    photographs: str | Path | None = None,
    rates: Sequence[float] = RATES,
) -> str:
    """Try learning rates for all models on a part of the training photograph that is held out.

    The photograph is cut in two before it is cut into tiles: the lower three quarters are trained
    on, and the upper quarter is evaluated on, turned in four ways as the tiles are. Trees of one
    photograph all lean one way, and of others another way. The test photograph is not used.

    Args:
        root, output, jobs, opts, photographs: as of :func:`compare_on_trees`; ``output`` receives
            tuning.md and tuning.json.
        rates: of each model.

    Returns:
        str: a table of the rates, as written to tuning.md.

    Raises:
        UsageError, DatasetError, RuntimeError: as :func:`compare_on_trees`.
    """
    train, _ = _begin(photographs)
    folder = output / "tuning"
    lower = _tiled(train, folder / "lower", _lower)
    held_out = _tiled(train, folder / "held_out", _upper, TURNS)
    tiles = _tiled(lower, folder / "tiles", _tiles, TURNS)
    planned = {
        (label, rate): _experiment(
            *(f"tuning-{kind}-{rate:g}", kind, tiles, held_out),
            (*overrides(_shorter(rate)), *opts),
        )
        for label, kind in MODELS.items()
        for rate in rates
    }
    outcomes = Experiments(root, output, default_device(), jobs).run(list(planned.values()))
    tried = {
        label: {f"{rate:g}": outcomes[planned[label, rate].name].final for rate in rates}
        for label in MODELS
    }
    rows = []
    for label, results in tried.items():
        # NaN where nothing was detected.
        values = {rate: np.nan_to_num(final["bbox/AP50"]) for rate, final in results.items()}
        cells = [f"{final['bbox/AP']:.1f}, {final['bbox/AP50']:.1f}" for final in results.values()]
        rows.append([label, *cells, max(values, key=values.get)])
    headers = ["model", *(f"AP, AP50 with {rate:g}" for rate in rates), "best AP50"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    text = (
        f"{table}\n\nAfter {TUNING_ITERATIONS} iterations, on the upper quarter of the training "
        "photograph, which is not trained on, turned in four ways."
    )
    write_text(output / "tuning.md", text + "\n")
    write_text(output / "tuning.json", json.dumps(tried, indent=2))
    return text


def _shorter(rate: float) -> dict[str, object]:
    return {
        "SOLVER.BASE_LR": rate,
        "SOLVER.MAX_ITER": TUNING_ITERATIONS,
        "TEST.EVAL_PERIOD": TUNING_ITERATIONS,
    }


def _begin(photographs: str | Path | None) -> tuple[_Data, _Data]:
    """Fetch the photographs and check them; return the data to train and to test on."""
    log_to(None)
    folder = Path(photographs) if photographs else fetch_trees(builtin_path("trees"))
    train, test = ((str(folder / split), "") for split in ("train", "test"))
    for data, use in ((train, "train"), (test, "test")):
        report = check_coco(*open_data(*data, use=use), training=use == "train")
        print(f"\n{describe_report(report)}\n")
    return train, test


def _tiles(height: int, width: int) -> list[Tile]:
    return tile_image(height, width, TILE_SIZE, OVERLAP)


def _upper(height: int, width: int) -> list[Tile]:
    return [Tile(0, 0, width, round(HELD_OUT * height))]


def _lower(height: int, width: int) -> list[Tile]:
    return [Tile(0, round(HELD_OUT * height), width, height)]


def _tiled(
    data: _Data,
    folder: Path,
    place: Callable[[int, int], Sequence[Tile]],
    turns: Sequence[int] = (0,),
) -> _Data:
    """Write parts of photographs, unless they are there, and return them as data."""
    settings = {
        "size": TILE_SIZE,
        "overlap": OVERLAP,
        "min_visible": MIN_VISIBLE,
        "held_out": HELD_OUT,
        "turns": list(turns),
    }
    annotations = folder / ANNOTATIONS
    if not annotations.exists():
        write_tiles(
            *open_data(*data), folder, place, min_visible=MIN_VISIBLE, turns=turns, info=settings
        )
    elif json.loads(annotations.read_text("utf-8"))["info"] != settings:
        raise UsageError(
            f"{folder} holds tiles with other settings; name another output, or remove that folder."
        )
    return str(annotations), str(folder / IMAGES)


def _experiment(name: str, kind: str, train: _Data, test: _Data, opts: Sequence[str]) -> Experiment:
    values = {}
    for split, (json_file, image_root) in (("TRAIN", train), ("TEST", test)):
        values[f"DATASETS.{split}_JSON"] = json_file
        if image_root:
            values[f"DATASETS.{split}_IMAGES"] = image_root
    values |= {"DATALOADER.NUM_WORKERS": 0, "SEED": 1}
    return Experiment(
        name, "train_net", f"Trees/retinanet_{kind}.yaml", (*overrides(values), *opts)
    )


def _config(root: Path, experiment: Experiment) -> Any:
    return load_config(str(root / "configs" / experiment.config), list(experiment.overrides))


def _row(
    label: str, experiment: Experiment, outcome: Outcome, root: Path, folder: Path
) -> dict[str, Any]:
    cfg = _config(root, experiment)
    parts = total(count_config(cfg, *[cfg.INPUT.JITTER.CROP_SIZE] * 2))
    records = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    times = [record["time"] for record in records if "time" in record]
    return {
        "model": label,
        "rate": cfg.SOLVER.BASE_LR,
        "AP": outcome.final["bbox/AP"],
        "AP50": outcome.final["bbox/AP50"],
        "parameters": parts.parameters,
        "flops": parts.flops,
        "seconds_per_iteration": statistics.median(times),
    }


def _draw(test: _Data, folder: Path, path: Path) -> None:
    """Draw the test photographs, annotated and with what the evaluation of a run has found."""
    # In a folder that is named after the data set.
    (found_file,) = folder.glob("inference/**/coco_instances_results.json")
    results = json.loads(found_file.read_text())
    name = f"drawn {test[0]}"
    samples = []
    records = load_coco(*open_data(*test, use="test"), name)
    metadata = MetadataCatalog.get(name)
    index = metadata.thing_dataset_id_to_contiguous_id
    for record in records:
        found = [result for result in results if result["image_id"] == record["image_id"]]
        samples.append(
            {
                "image": read_image(record["file_name"], MAX_PIXELS),
                "gt_boxes": box_corners(record["annotations"]),
                "gt_classes": [each["category_id"] for each in record["annotations"]],
                "boxes": box_corners(found),
                "scores": np.array([result["score"] for result in found]),
                "classes": [index[result["category_id"]] for result in found],
            }
        )
    classes = metadata.thing_classes
    draw_detections(samples, path, classes, DRAWN_SCORE, columns=1, panel=9.0, labels=False)
