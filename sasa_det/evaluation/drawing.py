"""Pictures of detections and training curves, as PNG files."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from ..utils.files import whole_file
from ..utils.text import without_formulas

logger = logging.getLogger(__name__)

# Detections: sizes in inches. A point of type is 1/72 inch.
DPI = 120
PANEL = 2.3
GAP = 0.06
CELL_GAP = 0.22
TITLE = 0.28
FONT_SIZE = 6.5

# Pictures of smaller images are enlarged, so that labels are small beside what they name.
_LEAST_SIDE = 512


def draw_detections(
    samples: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    columns: int = 4,
    *,
    panel: float = PANEL,
    labels: bool = True,
) -> Figure:
    """Draw images twice, with their ground truth and with what was detected, into one PNG.

    Args:
        samples: one a cell, at least one, each with "image" ((H, W, 3) uint8 RGB),
            "gt_boxes" ((G, 4) X0, Y0, X1, Y1 in pixels of the image), "gt_classes" ((G,) integer),
            "boxes" ((D, 4)), "scores" ((D,)) and "classes" ((D,)).
        path: the PNG to write.
        class_names: names by class index.
        score_threshold: detections with a lower score are not drawn.
        columns: cells in a row, at least 1.
        panel: width of each of the two drawings of an image, and their largest height, in inches.
        labels: write classes and scores at the boxes; False for very many boxes.

    Returns:
        Figure: what was drawn.

    Raises:
        ValueError: if there are no samples, or ``columns`` is less than 1.
    """
    if not samples:
        raise ValueError("samples is empty: at least one is needed")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    cell = 2 * panel + GAP
    # Less high where all images are wide.
    shapes = [each["image"].shape for each in samples]
    high = panel * min(1.0, max(rows_of / cols_of for rows_of, cols_of, _ in shapes))
    width = columns * cell + (columns + 1) * CELL_GAP
    height = rows * (high + TITLE) + CELL_GAP
    figure = Figure(figsize=(width, height), dpi=DPI)
    colours = _class_colours(len(class_names))
    for index, sample in enumerate(samples):
        row, column = divmod(index, columns)
        kept = np.asarray(sample["scores"]) >= score_threshold
        ground_truth = (sample["gt_boxes"], sample["gt_classes"], None)
        detected = tuple(np.asarray(sample[key])[kept] for key in ("boxes", "classes", "scores"))
        titles = ("Ground truth", f"Detections, score ≥ {score_threshold:g}")
        for side, (title, drawn) in enumerate(zip(titles, (ground_truth, detected), strict=True)):
            left = CELL_GAP + column * (cell + CELL_GAP) + side * (panel + GAP)
            bottom = height - (row + 1) * (high + TITLE)
            axes = figure.add_axes(
                (left / width, bottom / height, panel / width, high / height), anchor="N"
            )
            axes.set_title(title, fontsize=8, pad=3)
            _draw_panel(axes, sample["image"], *drawn, class_names if labels else None, colours)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return figure


def draw_instances(
    image: np.ndarray, instances: Instances, class_name: Callable[[int], str]
) -> np.ndarray:
    """Draw detections into an image with detectron2's Visualizer, a colour for each class.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: on the CPU: "pred_boxes", "scores", "pred_classes" and, if they are there,
            "pred_masks" and "pred_keypoints".
        class_name: returns the name of a class index.

    Returns:
        numpy.ndarray: (s H, s W, 3) uint8, RGB, with the integer s of :func:`enlarged_visualizer`.
    """
    if not len(instances):
        return enlarged(image)
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    colours = _class_colours(max(classes) + 1)
    given = {
        name: getattr(instances, field)
        for name, field in (("masks", "pred_masks"), ("keypoints", "pred_keypoints"))
        if instances.has(field)
    }
    if "masks" in given:
        given["masks"] = list(given["masks"].numpy())
    labels = [
        without_formulas(f"{class_name(index)} {score:.0%}")
        for index, score in zip(classes, scores, strict=True)
    ]
    drawn = enlarged_visualizer(image, Metadata()).overlay_instances(
        boxes=instances.pred_boxes,
        labels=labels,
        assigned_colors=[colours[index] for index in classes],
        alpha=0.8,
        **given,
    )
    return drawn.get_image()


def enlarged_visualizer(image: np.ndarray, metadata: Metadata) -> Visualizer:
    """Return detectron2's Visualizer of an image, whose pictures are enlarged if it is small.

    Args:
        image: (H, W, 3) uint8, RGB.
        metadata: of the Visualizer.

    Returns:
        Visualizer: its ``scale`` is the least integer with which the longer side of the picture has
        512 pixels or more, 1 for images that have as many.
    """
    return Visualizer(image, metadata, scale=_picture_scale(image))


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return an image in the size of the pictures of :func:`enlarged_visualizer`."""
    scale = _picture_scale(image)
    return image.repeat(scale, 0).repeat(scale, 1) if scale > 1 else image


def _picture_scale(image: np.ndarray) -> int:
    return -(-_LEAST_SIDE // max(image.shape[:2]))


def _draw_panel(
    axes: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str] | None,
    colours: np.ndarray,
) -> None:
    height, width = image.shape[:2]
    # Pixel (x, y) covers x..x+1, y..y+1, as it does in detectron2's box coordinates.
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    order = range(len(boxes)) if scores is None else np.argsort(scores)  # the surest on top
    for index in order:
        x0, y0, x1, y1 = (float(value) for value in boxes[index])
        label = int(classes[index])
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colours[label], lw=1.2)
        # A dark rim, for boxes on a background of their own colour.
        box.set_path_effects([withStroke(linewidth=2.0, foreground="black")])
        axes.add_patch(box)
        if class_names is None:
            continue
        text = class_names[label]
        if scores is not None:
            text += f" {scores[index]:.2f}"
        # Above the box; below it where there is no room, a label being about 1/18 of the panel.
        above = y0 >= max(height, width) / 18
        from_left = x0 < 0.75 * width
        axes.text(
            max(x0, 0) if from_left else min(x1, width),
            y0 if above else y1,
            text,
            fontsize=FONT_SIZE,
            color="black" if colours[label] @ (0.299, 0.587, 0.114) > 0.5 else "white",
            ha="left" if from_left else "right",
            va="bottom" if above else "top",
            bbox={"facecolor": colours[label], "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )


def _class_colours(count: int) -> np.ndarray:
    """Return colours that are far apart for neighbouring classes, (count, 3) float in 0..1."""
    # Steps of the golden ratio spread any number of hues evenly; brightness alternates in threes.
    index = np.arange(count)
    hue = (index * 0.618034) % 1
    value = np.array([1.0, 0.75, 0.9])[index % 3]
    saturation = np.array([0.95, 0.85, 0.7])[index % 3]
    return hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))


def draw_curves(runs: Mapping[str, str | os.PathLike], path: str | os.PathLike) -> Figure:
    """Draw loss and AP of training runs against the iteration into one PNG.

    Args:
        runs: the legend's label of every run, and its ``metrics.json`` as detectron2's trainer
            writes it.
        path: the PNG to write.

    Returns:
        Figure: what was drawn.

    Raises:
        ValueError: if there are no runs, or a file is not JSON lines or has neither ``total_loss``
            nor ``bbox/AP`` in it.
        FileNotFoundError: if a metrics file does not exist.
    """
    if not runs:
        raise ValueError("runs is empty: at least one metrics.json is needed")
    figure = Figure(figsize=(12, 4.5), dpi=DPI, layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    for number, (label, metrics_path) in enumerate(runs.items()):
        records = _read_metrics(metrics_path)
        curves = {key: _curve(records, key) for key in ("total_loss", "bbox/AP", "bbox/AP50")}
        if not any(len(iterations) for iterations, _ in curves.values()):
            raise ValueError(
                f"{metrics_path} has neither 'total_loss' nor 'bbox/AP' in any line: it must be "
                "the metrics.json of a detectron2 training"
            )
        colour = f"C{number % 10}"
        iterations, losses = curves["total_loss"]
        loss_axes.plot(iterations, losses, color=colour, alpha=0.25, lw=0.8)
        loss_axes.plot(iterations, _running_median(losses), color=colour, lw=1.8, label=label)
        for key, style in (("bbox/AP", "-"), ("bbox/AP50", "--")):
            iterations, values = curves[key]
            if len(iterations):
                name = f"{label}, {key.removeprefix('bbox/')}"
                ap_axes.plot(iterations, values, style, color=colour, marker="o", ms=4, label=name)
    loss_axes.set_title("Training loss (running median; raw behind it)")
    loss_axes.set_ylabel("total loss")
    loss_axes.set_yscale("log")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    ap_axes.set_title("Box AP on the test set")
    ap_axes.set_ylabel("AP (0 to 100)")
    ap_axes.set_ylim(bottom=0)
    for axes in (loss_axes, ap_axes):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    loss_axes.legend()
    if ap_axes.lines:
        ap_axes.legend()
    else:
        ap_axes.text(
            0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=ap_axes.transAxes
        )
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return figure


def draw_mean_curves(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[int, float]]]]],
    path: str | os.PathLike,
    title: str,
) -> Figure:
    """Draw the mean of several runs, and the range of their values behind it, into one PNG.

    Args:
        panels: what stands above each panel to its curves, which are the legend's label to the
            (iteration, AP) points of each run; the runs of a label were evaluated at the same
            iterations.
        path: the PNG to write.
        title: what stands above all panels.

    Returns:
        Figure: what was drawn.

    Raises:
        ValueError: if there are no curves, or those of a label differ in their iterations.
    """
    if not panels or not all(c and all(c.values()) for c in panels.values()):
        raise ValueError("every panel must have curves, and at least one run of each label")
    size = (1.5 + 4.5 * len(panels), 4.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, curves) in zip(all_axes, panels.items(), strict=True):
        for number, (label, runs) in enumerate(curves.items()):
            _draw_mean(axes, label, runs, f"C{number % 10}")
        axes.set_title(panel)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0].set_ylabel("AP (0 to 100)")
    all_axes[0].set_ylim(bottom=0)
    figure.suptitle(title)
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    return figure


def _draw_mean(
    axes: Axes, label: str, runs: Sequence[Sequence[tuple[int, float]]], colour: str
) -> None:
    iterations = [point[0] for point in runs[0]]
    if any([point[0] for point in run] != iterations for run in runs):
        raise ValueError(f"the runs of {label!r} were evaluated at different iterations")
    values = np.array([[point[1] for point in run] for run in runs])
    axes.plot(iterations, values.mean(0), color=colour, marker="o", ms=4, label=label)
    axes.fill_between(iterations, values.min(0), values.max(0), color=colour, alpha=0.15)


def _read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
            logger.warning("%s: the last line is cut off and left out", path)
    return records


def _curve(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    # A resumed run repeats iterations: the later record is the one that counts.
    values = {r["iteration"]: r[key] for r in records if "iteration" in r and key in r}
    iterations = sorted(values)
    return np.array(iterations, dtype=float), np.array([values[i] for i in iterations], dtype=float)


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(len(values) // 40, 1)
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )
