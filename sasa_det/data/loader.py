"""Training data as a function of seed and position, so that a run can go on where it stopped."""

import hashlib
import os
import random
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import islice
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from ..errors import DatasetError, ImageError
from ..utils.seeding import seeded
from .images import UnreadableImages
from .mapper import build_train_mapper

_ATTEMPTS = 100


class _Batches(Dataset):
    """Batches of mapped records; random numbers of a sample follow from seed and position alone."""

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict | None],
        collate: Callable[[list[dict[str, Any]]], Any],
        seed: int,
    ):
        self.records, self.mapper, self.collate, self.seed = records, mapper, collate, seed

    def __getitem__(self, samples: list[tuple[int, int]]) -> tuple[list[ImageError], Any]:
        """Return the errors of unreadable images, and a batch in which others stand in for them."""
        errors = []
        mapped = [self._mapped(position, index, errors) for position, index in samples]
        return errors, self.collate(mapped)

    def _mapped(self, position: int, index: int, errors: list[ImageError]) -> dict[str, Any]:
        before = len(errors)
        with seeded(self.seed, position):
            # As in detectron2, another record stands in for one that the mapper drops.
            for _ in range(_ATTEMPTS):
                try:
                    mapped = self.mapper(self.records[index])
                except ImageError as error:
                    errors.append(error)
                    mapped = None
                if mapped is not None:
                    return mapped
                index = random.randrange(len(self.records))
        if errors[before:]:
            raise errors[before]
        raise DatasetError(
            f"the mapper dropped {_ATTEMPTS} records in a row: there is next to no training data"
        )


class TrainLoader:
    """Endless training batches that resume where they stopped, bit for bit.

    Order of the records and random augmentation follow from the seed and the position in the
    sequence, not from the history of a process: they are the same with any number of worker
    processes, and for a given batch size with any number of training processes.
    """

    def __init__(
        self,
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
        collate: Callable[[list[dict[str, Any]]], Any] = trivial_batch_collator,
        max_unreadable: int = 0,
        max_unreadable_fraction: float = 0.0,
    ):
        """
        Args:
            dataset: dataset dicts in detectron2's format. Those of a list are packed for the
                workers to share; another sequence is kept as it is.
            mapper: makes the model's input of one; None drops it.
            total_batch_size: images of all processes together.
            seed: what order and augmentation follow from, not negative.
            sampler: "TrainingSampler", or "RepeatFactorTrainingSampler" with ``repeat_threshold``.
            repeat_threshold: frequency of a category below which its images are repeated.
            aspect_ratio_grouping: whether a batch's images are all upright or all oblong.
            parts: parts that each process' share of a batch is split into.
            num_workers: processes that read and augment, for each training process.
            pin_memory: whether batches are in page-locked memory.
            collate: makes a batch of mapped records, in the worker; a list of them if not given.
            max_unreadable: different images that may be skipped as unreadable.
            max_unreadable_fraction: the same as a fraction of all; the larger number counts.

        Raises:
            ValueError: if the sampler is unknown or the batch cannot be split evenly.
            DatasetError: if there are no records.
        """
        check_shares(total_batch_size, comm.get_world_size(), parts)
        if not len(dataset):
            raise DatasetError("there are no training data: at least one record is needed")
        self.num_images = len(dataset)
        self.batch_size, self.parts, self.seed = total_batch_size, parts, seed
        self._draw_epoch = _epochs_of(sampler, dataset, repeat_threshold)
        self._is_oblong = None
        if aspect_ratio_grouping:
            self._is_oblong = [record["width"] > record["height"] for record in dataset]
        self._fingerprint = _fingerprint(dataset)
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self._batches = partial(_Batches, dataset, mapper, collate)
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._unreadable = UnreadableImages(
            max_unreadable, fraction=max_unreadable_fraction, num_images=self.num_images
        )
        self._yielded = 0
        self._closing = multiprocessing.Event()
        # Before multiprocessing ends the workers, also where this process is a worker itself.
        Finalize(self, self._closing.set, exitpriority=10)

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            self._batches(self.seed),
            batch_size=None,
            sampler=self._shares(self._yielded // self.parts),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=partial(_begin_worker, self._closing),
            pin_memory=self._pin_memory,
            # Its own: the loader would take a number from torch's generator.
            generator=torch.Generator(),
        )
        for errors, batch in loader:
            for error in errors:
                self._unreadable.skip(error)
            self._yielded += 1
            yield batch

    def _shares(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """Yield (position, index) of each part of this process' batches, endlessly."""
        # Every process draws the whole batch, for an order that does not depend on their number.
        rank = comm.get_rank()
        share = self.batch_size // comm.get_world_size()
        size = share // self.parts
        # Which images make a batch of one orientation follows from all images before them.
        first_drawn = 0 if self._is_oblong else start
        for batch in islice(self._whole_batches(first_drawn), start - first_drawn, None):
            own = batch[rank * share : (rank + 1) * share]
            for first in range(0, share, size):
                yield own[first : first + size]

    def _whole_batches(self, start: int) -> Iterator[list[tuple[int, int]]]:
        # Images of one batch have one orientation, which keeps padding small.
        waiting = defaultdict(list)
        for sample in self._samples(start * self.batch_size):
            group = self._is_oblong and self._is_oblong[sample[1]]
            waiting[group].append(sample)
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)

    def _samples(self, start: int) -> Iterator[tuple[int, int]]:
        """Pass over whole epochs, which may be a hundred of a million images, at once."""
        # Iterating over detectron2's sampler would give the indices of this process alone.
        generator = torch.Generator().manual_seed(self.seed)
        position = 0
        while True:
            epoch = self._draw_epoch(generator)
            epoch = epoch[torch.randperm(len(epoch), generator=generator)]
            skipped = min(max(start - position, 0), len(epoch))
            yield from enumerate(epoch[skipped:].tolist(), position + skipped)
            position += len(epoch)

    @property
    def num_unshared(self) -> int:
        """How many unreadable images were skipped that other processes do not know of."""
        return len(self._unreadable.unshared)

    def share_unreadable(self) -> None:
        """Count the images that any process has skipped, to be called by all of them.

        Raises:
            DatasetError: if they are more than may be skipped.
        """
        found = comm.all_gather(self._unreadable.unshared)
        self._unreadable.unshared = []
        self._unreadable.merge([path for paths in found for path in paths])

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was given last, and what was skipped so far."""
        return {
            "seed": self.seed,
            "images": self._yielded // self.parts * self.batch_size,
            "unreadable": list(self._unreadable.paths),
            "records": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; before the first batch is asked for.

        With another batch size the sequence goes on at the same image, up to a batch.

        Raises:
            DatasetError: if the position is one in other records.
        """
        if state["records"] != self._fingerprint:
            raise DatasetError(
                "the training data are not those that the checkpoint was trained on: images, boxes "
                "or classes have changed, or their order; give the old data, or begin another run "
                "that starts from the weights of the checkpoint (MODEL.WEIGHTS)"
            )
        self.seed = state["seed"]
        self._yielded = state["images"] // self.batch_size * self.parts
        self._unreadable.paths = list(state["unreadable"])


def check_shares(
    batch_size: int,
    num_processes: int,
    parts: int,
    names: tuple[str, str] = ("total_batch_size", "parts"),
) -> None:
    """Raise ValueError unless a batch is split evenly into the parts of all processes.

    Args:
        batch_size, num_processes, parts: as for :class:`TrainLoader`.
        names: names of the batch size and of the parts in the message.
    """
    shares = num_processes * parts
    if batch_size % shares:
        raise ValueError(
            f"{names[0]} must be a multiple of the number of processes times {names[1]}, which is "
            f"{shares}, got {batch_size}."
        )


def _epochs_of(
    sampler: str, records: Sequence[dict], repeat_threshold: float
) -> Callable[[torch.Generator], Tensor]:
    """Return what draws the indices of an epoch, before they are shuffled, for a sampler."""
    if sampler == "TrainingSampler":
        indices = torch.arange(len(records))
        return lambda generator: indices
    if sampler == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, repeat_threshold
        )
        return RepeatFactorTrainingSampler(factors, seed=0)._get_epoch_indices
    raise ValueError(
        "sampler (DATALOADER.SAMPLER_TRAIN) must be TrainingSampler or "
        f"RepeatFactorTrainingSampler, got {sampler}."
    )


def _fingerprint(records: Sequence[dict[str, Any]]) -> str:
    """Return a digest of the names, boxes and classes of records, wherever their folder is."""
    digest = hashlib.sha256()
    for record in records:
        boxes = [(a["category_id"], a["bbox"]) for a in record.get("annotations", ())]
        content = record.get("label", boxes)
        digest.update(repr((os.path.basename(record["file_name"]), content)).encode())
    return digest.hexdigest()


def end_with_parent(worker_id: int = 0) -> None:
    """End this worker of a DataLoader when its parent has ended, also where that was killed.

    It would wait for ever for the pipe of its batches, to which its siblings hold the other end.
    """

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def end_workers_with_parent(loader: Any) -> Any:
    """Have the workers of a DataLoader that detectron2 built call :func:`end_with_parent`."""
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = end_with_parent
    return loader


def _begin_worker(closing: Event, worker_id: int) -> None:
    """Leave signals to the training process, which finishes its step with what the workers read."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Also sent to end a worker, by the training process at its own end.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)


def build_train_loader(
    cfg: CfgNode,
    seed: int | None = None,
    *,
    mapper: Callable[[dict], dict | None] | None = None,
) -> TrainLoader:
    """Build the loader of ``DATASETS.TRAIN``.

    Args:
        cfg: a config with sasa_det's keys.
        seed: order and augmentation follow from it, not negative; ``SEED`` of the config if None,
            and 0 if that is negative.
        mapper: makes the model's input of a dataset dict, and drops it by returning None;
            :func:`build_train_mapper` if None.

    Raises:
        ValueError, DatasetError: as :class:`TrainLoader`; also if no image has the annotations
            that the config asks for.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=proposals if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # as detectron2 says that no image is left
        raise DatasetError(f"DATASETS.TRAIN cannot be used for training: {error}") from error
    return TrainLoader(
        records,
        mapper or build_train_mapper(cfg),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=max(cfg.SEED, 0) if seed is None else seed,
        sampler=cfg.DATALOADER.SAMPLER_TRAIN,
        repeat_threshold=cfg.DATALOADER.REPEAT_THRESHOLD,
        # Crops of one size need no grouping.
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING and not cfg.INPUT.JITTER.ENABLED,
        **loader_options(cfg),
    )


def loader_options(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of :class:`TrainLoader` that mean the same in every task."""
    return {
        "parts": cfg.SOLVER.ACCUMULATION_STEPS,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda"),
        "max_unreadable": cfg.DATALOADER.SKIP_UNREADABLE,
        "max_unreadable_fraction": cfg.DATALOADER.SKIP_UNREADABLE_FRACTION,
    }


@wraps(TrainLoader, assigned=(), updated=())
def detection_train_loader(*args: Any, **options: Any) -> TrainLoader:
    """Build a :class:`TrainLoader` from its arguments, for LazyConfigs."""
    return TrainLoader(*args, **options)
