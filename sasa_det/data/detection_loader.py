"""The training loader with explicit arguments, as a LazyConfig gives them."""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode

from .loader import TrainLoader, _indices

__all__ = ["detection_train_loader"]


def detection_train_loader(
    dataset: Sequence[dict[str, Any]],
    mapper: Callable[[dict], dict | None],
    *,
    total_batch_size: int,
    seed: int = 0,
    sampler: str = "TrainingSampler",
    repeat_threshold: float = 0.0,
    aspect_ratio_grouping: bool = True,
    parts: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    max_unreadable: int = 0,
) -> TrainLoader:
    """Make the loader of a data set.

    Args:
        dataset: dataset dicts in detectron2's format.
        mapper: makes the model's input of one; None drops it.
        total_batch_size: images of all processes together.
        seed: what order and augmentation follow from, not negative.
        sampler: "TrainingSampler", or "RepeatFactorTrainingSampler" with ``repeat_threshold``.
        repeat_threshold: frequency of a category below which its images are repeated.
        aspect_ratio_grouping, parts, num_workers, pin_memory, max_unreadable: as of
            :class:`TrainLoader`.

    Raises:
        ValueError: if the sampler is unknown or the batch cannot be split evenly.
    """
    options = {"SAMPLER_TRAIN": sampler, "REPEAT_THRESHOLD": repeat_threshold}
    return TrainLoader(
        dataset,
        mapper,
        batch_size=total_batch_size,
        seed=seed,
        indices=_indices(CfgNode({"DATALOADER": options}), dataset),
        aspect_ratio_grouping=aspect_ratio_grouping,
        parts=parts,
        num_workers=num_workers,
        pin_memory=pin_memory,
        max_unreadable=max_unreadable,
    )
