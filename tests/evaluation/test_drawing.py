import json
import os

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from sasa_det.evaluation import drawing
from sasa_det.evaluation.drawing import (
    draw_curves,
    draw_detections,
    draw_instances,
    draw_mean_curves,
)

NAMES = ("cat", "dog", "owl")


def sample(height=60, width=80):
    return {
        "image": np.full((height, width, 3), 90, np.uint8),
        "gt_boxes": np.array([[20.0, 15.0, 60.0, 45.0]]),
        "gt_classes": np.array([1]),
        "boxes": np.array([[10.0, 15.0, 40.0, 50.0], [50.0, 30.0, 75.0, 55.0]]),
        "scores": np.array([0.9, 0.3]),
        "classes": np.array([2, 0]),
    }


def colour_along(pixels, figure, axes, points):
    """The drawn RGB at points of an image panel, in 0..255."""
    figure.draw_without_rendering()  # settles the panels' places
    to_pixels = figure.axes[axes].transData.transform(np.asarray(points, dtype=float))
    columns, rows = np.floor(to_pixels).astype(int).T
    return pixels[pixels.shape[0] - 1 - rows, columns]


def drawn(path, samples, **options):
    """The pixels of the file, and the figure."""
    figure = draw_detections(samples, path, NAMES, **options)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int), figure


def test_very_many_boxes_are_drawn_large_and_without_labels(tmp_path):
    small, _ = drawn(tmp_path / "small.png", [sample()])
    pixels, figure = drawn(tmp_path / "large.png", [sample()], panel=5.0, labels=False)
    assert pixels.shape[1] - small.shape[1] == pytest.approx(2 * (5.0 - drawing.PANEL) * 120, abs=1)
    assert [len(axes.texts) for axes in figure.axes] == [0, 0]
    assert [len(axes.patches) for axes in figure.axes] == [1, 1]


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_class(tmp_path):
    pixels, figure = drawn(tmp_path / "a.png", [sample()])
    colours = np.rint(drawing._class_colours(3) * 255)
    # Middles of the bottom and right edges; labels are at the top.
    gt_edge = [(48, 45), (60, 30)]
    surest_edge = [(25, 50), (10, 30)]
    weak_edge = [(62, 55), (75, 42)]
    assert np.abs(colour_along(pixels, figure, 0, gt_edge) - colours[1]).max() <= 40
    assert np.abs(colour_along(pixels, figure, 1, surest_edge) - colours[2]).max() <= 40
    # The image itself: where a detection is too weak, on the other panel, and inside of boxes.
    for axes, points in ((1, weak_edge), (0, surest_edge), (1, gt_edge[:1]), (0, [(40, 30)])):
        assert (colour_along(pixels, figure, axes, points) == 90).all()


def test_threshold_decides_what_is_drawn(tmp_path):
    for threshold, labels in ((0.5, ["owl 0.90"]), (0.3, ["cat 0.30", "owl 0.90"]), (0.95, [])):
        _, figure = drawn(tmp_path / "a.png", [sample()], score_threshold=threshold)
        gt_axes, axes = figure.axes
        assert [text.get_text() for text in axes.texts] == labels
        assert [text.get_text() for text in gt_axes.texts] == ["dog"]
        assert f"{threshold:g}" in axes.get_title()


# Wide images leave no room below them.
@pytest.mark.parametrize("shape,share", [((60, 80), 0.75), ((80, 80), 1), ((80, 60), 1)])
def test_size_of_the_grid(tmp_path, shape, share):
    cell, panel = 2 * drawing.PANEL + drawing.GAP, share * drawing.PANEL + drawing.TITLE
    for count, columns, rows, wide in ((1, 4, 1, 1), (5, 4, 2, 4), (3, 1, 3, 1)):
        samples = [sample(*shape), *[sample()] * (count - 1)]
        pixels, _ = drawn(tmp_path / f"{count}.png", samples, columns=columns)
        width = wide * cell + (wide + 1) * drawing.CELL_GAP
        height = rows * panel + drawing.CELL_GAP
        expected = (int(height * drawing.DPI), int(width * drawing.DPI))
        assert np.abs(np.subtract(pixels.shape[:2], expected)).max() <= 1


def test_images_of_all_shapes_and_without_boxes(tmp_path):
    empty = {
        **sample(30, 120),
        "gt_boxes": np.zeros((0, 4)),
        "gt_classes": np.zeros(0, int),
        "boxes": np.zeros((0, 4)),
        "scores": np.zeros(0),
        "classes": np.zeros(0, int),
    }
    pixels, figure = drawn(tmp_path / "a.png", [empty, sample(120, 30)])
    corners = [(1, 1), (119, 1), (1, 29), (119, 29)]
    assert (colour_along(pixels, figure, 0, corners) == 90).all()


def test_colours_of_classes_differ():
    colours = drawing._class_colours(20)
    assert colours.shape == (20, 3) and colours.min() >= 0 and colours.max() <= 1
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 9 * np.eye(20)
    assert distances.min() > 0.1


def test_arguments_are_checked_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="samples is empty"):
        draw_detections([], tmp_path / "a.png", NAMES)
    with pytest.raises(ValueError, match="columns must be >= 1, got 0"):
        draw_detections([sample()], tmp_path / "a.png", NAMES, columns=0)
    with pytest.raises(ValueError, match="runs is empty"):
        draw_curves({}, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, target, **options):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_detections([sample()], path, NAMES)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_curves_show_the_numbers_of_the_file(tmp_path):
    # Detectron2 may write the losses and the evaluation of one iteration on two lines. The run was
    # resumed at 20: the second record of it counts.
    records = [
        {"iteration": 0, "total_loss": 4.0, "lr": 0.1},
        {"iteration": 20, "total_loss": 9.0},
        {"iteration": 20, "total_loss": 3.0},
        {"iteration": 40, "total_loss": 1.0},
        {"iteration": 40, "bbox/AP": 12.5, "bbox/AP50": 30.0},
        {"iteration": 60, "total_loss": 2.0},
    ]
    path = write_lines(tmp_path / "metrics.json", records)
    loss_axes, ap_axes = draw_curves({"run": path}, tmp_path / "a.png").axes
    raw, smooth = (line.get_xydata().tolist() for line in loss_axes.lines)
    assert raw == [[0, 4], [20, 3], [40, 1], [60, 2]]
    # Medians of each value and its neighbours; the ends have one.
    assert smooth == [[0, 3.5], [20, 3], [40, 2], [60, 1.5]]
    assert loss_axes.get_yscale() == "log"
    assert [line.get_xydata().tolist() for line in ap_axes.lines] == [[[40, 12.5]], [[40, 30]]]
    assert [line.get_label() for line in ap_axes.lines] == ["run, AP", "run, AP50"]
    assert all(line.get_marker() == "o" for line in ap_axes.lines)


def test_curves_file_is_a_png_with_ink_on_both_panels(tmp_path):
    path = write_lines(
        tmp_path / "metrics.json",
        [{"iteration": i, "total_loss": 5.0 - i / 50} for i in range(0, 200, 20)]
        + [{"iteration": 199, "bbox/AP": 20.0, "bbox/AP50": 50.0}],
    )
    draw_curves({"one": path, "two": path}, tmp_path / "out" / "curves.png")
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert image.format == "PNG" and image.size == (12 * drawing.DPI, int(4.5 * drawing.DPI))
        pixels = np.asarray(image.convert("RGB")).astype(int)
    orange = np.abs(pixels - (255, 127, 14)).max(axis=-1) <= 12  # matplotlib's second colour
    left, right = np.split(orange, 2, axis=1)
    assert left.sum() > 100 and right.sum() > 20


def test_run_without_evaluation_says_so(tmp_path):
    path = write_lines(tmp_path / "metrics.json", [{"iteration": 0, "total_loss": 1.0}])
    _, ap_axes = draw_curves({"run": path}, tmp_path / "a.png").axes
    assert [text.get_text() for text in ap_axes.texts] == ["no evaluation yet"]


def test_broken_metrics_are_named(tmp_path, caplog):
    path = write_lines(tmp_path / "metrics.json", [{"iteration": 0, "total_loss": 1.0}])
    path.write_text(path.read_text() + '{"iteration": 20, "tot')
    assert len(drawing._read_metrics(path)) == 1
    assert "the last line is cut off" in caplog.text
    path.write_text('{"iter\n' + '{"iteration": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.json: line 1 is not JSON"):
        draw_curves({"run": path}, tmp_path / "a.png")
    path.write_text('{"iteration": 0, "lr": 0.1}\n')
    with pytest.raises(ValueError, match=r"metrics\.json has neither 'total_loss' nor 'bbox/AP'"):
        draw_curves({"run": path}, tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        draw_curves({"run": tmp_path / "none.json"}, tmp_path / "a.png")


def instances_of(boxes, classes, size=(90, 120)):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.linspace(0.9, 0.5, len(boxes))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def test_instances_are_drawn_in_the_colours_of_their_classes():
    image = np.full((300, 600, 3), 90, np.uint8)
    boxes = [[20, 100, 180, 250], [220, 100, 380, 250], [420, 100, 580, 250]]
    instances = instances_of(boxes, [2, 0, 2], size=(300, 600))
    found = draw_instances(image, instances, "a $ {}".format)
    assert found.shape == image.shape and found.dtype == np.uint8 and (image == 90).all()
    # On the lower edges: the labels are above.
    first, second, third = (found[248:253, x].astype(int) for x in (100, 300, 500))
    assert np.array_equal(first, third) and abs(first - second).max() > 60
    assert (found[255:] == 90).all() and (found[80:100, 20:60] != 90).any()
    # A class has the same colour in every image.
    again = draw_instances(image, instances[:1], str)
    assert np.array_equal(again[248:253, 100], first)


def test_small_images_are_drawn_enlarged():
    image = np.arange(100 * 128 * 3, dtype=np.uint8).reshape(100, 128, 3)
    alone = draw_instances(image, instances_of([], []), str)
    assert np.array_equal(alone, np.kron(image, np.ones((4, 4, 1), np.uint8)))
    found = draw_instances(image, instances_of([[30, 40, 60, 80]], [1]), str)
    # One size for all images of a video, whatever is found in them.
    assert found.shape == alone.shape
    changed = (found != alone).any(axis=2)
    assert changed[160:320, 119:122].all() and not changed[:, 260:].any()
    # Of the object, which has 30 x 40 pixels, the label leaves nearly all to be seen.
    assert changed[165:315, 125:235].mean() < 0.2
    large = np.zeros((100, 512, 3), np.uint8)
    assert draw_instances(large, instances_of([[9, 9, 50, 50]], [1]), str).shape == large.shape


def test_masks_are_drawn_and_images_without_instances_stay():
    image = np.full((90, 600, 3), 90, np.uint8)
    assert np.array_equal(draw_instances(image, instances_of([], []), str), image)
    instances = instances_of([[20, 20, 100, 80]], [1], size=(90, 600))
    plain = draw_instances(image, instances, str)
    instances.pred_masks = torch.zeros(1, 90, 600, dtype=torch.bool)
    instances.pred_masks[0, 60:70, 60:70] = True
    masked = draw_instances(image, instances, str)
    changed = (plain != masked).any(axis=2)
    assert changed[62:68, 62:68].all() and not changed[:55, 75:].any()


def test_mean_curves_show_the_mean_and_the_range_of_runs(tmp_path):
    curves = {
        "convolution": [[(10, 20.0), (20, 30.0)], [(10, 30.0), (20, 60.0)]],
        "attention": [[(5, 40.0)]],
    }
    panels = {"from scratch": curves, "pretrained": {"attention": [[(5, 50.0)]]}}
    figure = draw_mean_curves(panels, tmp_path / "curves.png", "Box AP")
    axes, other = figure.axes
    assert [each.get_title() for each in figure.axes] == ["from scratch", "pretrained"]
    assert other.lines[0].get_xydata().tolist() == [[5, 50]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"convolution": [[10, 25], [20, 45]], "attention": [[5, 40]]}
    (corners,) = axes.collections[0].get_paths()
    assert {(10.0, 20.0), (10.0, 30.0), (20.0, 30.0), (20.0, 60.0)} <= set(
        map(tuple, corners.vertices.tolist())
    )
    assert (tmp_path / "curves.png").stat().st_size > 0
    uneven = {"convolution": [[(10, 20.0)], [(11, 20.0)]]}
    with pytest.raises(ValueError, match="'convolution' were evaluated at different iterations"):
        draw_mean_curves({"uneven": uneven}, tmp_path / "other.png", "Box AP")
    with pytest.raises(ValueError, match="at least one run"):
        draw_mean_curves({"a": curves, "b": {"none": []}}, tmp_path / "other.png", "Box AP")
    assert not (tmp_path / "other.png").exists()
