"""Accuracy counted by hand, over batches; engine/process_checks.py adds up that of processes."""

import pytest
import torch

from sasa_det.errors import DatasetError, ImageError
from sasa_det.evaluation.accuracy import ClassificationEvaluator

LABELS = [0, 1, 2, 3, 4, 5, 6]
# For each image the classes from best to worst score.
RANKS = [
    [0, 1, 2, 3, 4, 5, 6],  # first
    [0, 1, 2, 3, 4, 5, 6],  # second
    [2, 1, 0, 3, 4, 5, 6],  # first
    [6, 5, 4, 0, 3, 1, 2],  # fifth
    [0, 1, 2, 3, 5, 6, 4],  # last
    [0, 1, 2, 3, 4, 5, 6],  # sixth
    [6, 1, 2, 3, 4, 5, 0],  # first
]


def outputs(ranks):
    for rank in ranks:
        scores = torch.empty(7)
        scores[rank] = torch.arange(7, 0, -1) / 28
        yield {"scores": scores}


def process(evaluator, indices):
    labels = torch.tensor([LABELS[i] for i in indices])
    evaluator.process({"label": labels}, list(outputs(RANKS[i] for i in indices)))


def test_top1_and_top5_are_counted():
    evaluator = ClassificationEvaluator("set")
    process(evaluator, [0, 1, 2])
    process(evaluator, [3, 4, 5, 6])
    expected = {"top1": 100 * 3 / 7, "top5": 100 * 5 / 7, "images": 7, "unreadable": 0}
    assert evaluator.evaluate() == {"classification": pytest.approx(expected)}
    evaluator.reset()
    process(evaluator, [1])
    assert evaluator.evaluate()["classification"]["top1"] == 0


def test_fewer_than_five_classes():
    evaluator = ClassificationEvaluator("set")
    scores = [{"scores": torch.tensor([0.2, 0.8])}, {"scores": torch.tensor([0.7, 0.3])}]
    evaluator.process({"label": torch.tensor([1, 1])}, scores)
    results = evaluator.evaluate()["classification"]
    assert (results["top1"], results["top5"]) == (50, 100)


def test_unreadable_images_are_left_out_up_to_a_limit():
    evaluator = ClassificationEvaluator("set", max_unreadable=1)
    process(evaluator, [0, 1])
    evaluator.process({"unreadable": [ImageError("broken", "a.png")]}, [])
    results = evaluator.evaluate()["classification"]
    assert (results["top1"], results["images"], results["unreadable"]) == (50, 2, 1)
    evaluator.process({"unreadable": [ImageError("broken", "b.png")]}, [])
    with pytest.raises(DatasetError, match="2 of 4 images of set cannot be read.*a.png.*b.png"):
        evaluator.evaluate()
