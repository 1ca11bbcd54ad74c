"""Inference in batches that change nothing."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn


def infer_in_batches(
    model: nn.Module, inputs: Sequence[dict[str, Any]], batch_size: int
) -> list[dict[str, Any]]:
    """Run a detector on images of any sizes, each of which gets the result that it gets alone.

    detectron2 pads the images of a batch to the size of the largest. What lies beyond the border of
    an image is then no longer outside, but pixels, which attend, are attended to and get the bias
    of every layer, and so the boxes near the border change. Batches are therefore made of images
    that have the same size after the padding that each of them needs by itself, to a multiple of
    the backbone's stride.

    Args:
        model: a detector of this project or of detectron2, in eval mode.
        inputs: of the model, as a mapper gives them, each with "image", (C, H, W).
        batch_size: how many images go through the model at once, at most.

    Returns:
        list[dict]: the model's outputs, in the order of the inputs.
    """
    backbone = getattr(model, "backbone", None)
    stride = max(getattr(backbone, "size_divisibility", 0), 1)
    groups = defaultdict(list)
    for index, sample in enumerate(inputs):
        height, width = sample["image"].shape[-2:]
        groups[-(-height // stride), -(-width // stride)].append(index)
    outputs: list[dict[str, Any]] = [{} for _ in inputs]
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            indices = group[start : start + batch_size]
            batch = model([inputs[index] for index in indices])
            for index, output in zip(indices, batch, strict=True):
                outputs[index] = output
    return outputs
