"""Training data is a function of seed and position."""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from sasa_det.config.defaults import default_config
from sasa_det.data import loader as loader_module
from sasa_det.data.loader import TrainLoader, build_train_loader, detection_train_loader
from sasa_det.errors import DatasetError, ImageError

RECORDS = [
    {"file_name": f"{i}.png", "width": 10 + i % 3 * 10, "height": 20, "image_id": i}
    for i in range(10)
]


def mapper(record):
    """Draw from all three generators, as augmentations do."""
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return {**record, "drawn": drawn}


def make(mapper=mapper, batch_size=4, seed=3, **options):
    options = {"total_batch_size": batch_size, "aspect_ratio_grouping": False, **options}
    return TrainLoader(RECORDS, mapper, seed=seed, **options)


def take(loader, count):
    return list(itertools.islice(loader, count))


def test_every_image_once_an_epoch_in_an_order_of_the_seed():
    first = take(make(batch_size=5), 2)
    assert sorted(x["image_id"] for batch in first for x in batch) == list(range(10))
    assert take(make(batch_size=5), 2) == first
    assert take(make(batch_size=5, seed=4), 2) != first


def test_workers_and_the_process_own_numbers_change_nothing():
    alone = take(make(), 8)
    torch.rand(3), np.random.rand(5), random.random()
    state = torch.get_rng_state()
    assert take(make(num_workers=2), 8) == alone
    assert torch.equal(torch.get_rng_state(), state)
    # No two samples share their numbers.
    drawn = [number for batch in alone for x in batch for number in x["drawn"]]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"aspect_ratio_grouping": True}, {"parts": 2}])
def test_resumes_where_it_stopped(num_workers, options):
    parts = options.get("parts", 1)
    unbroken = take(make(**options), 12 * parts)
    first = make(num_workers=num_workers, **options)
    assert take(first, 5 * parts) == unbroken[: 5 * parts]
    second = make(seed=99, num_workers=num_workers, **options)
    second.load_state_dict(first.state_dict())
    assert take(second, 7 * parts) == unbroken[5 * parts :]
    state = second.state_dict()
    assert (state["seed"], state["images"], state["unreadable"]) == (3, 48, [])


def test_positions_are_of_the_same_records():
    first = make()
    take(first, 1)
    others = [{**record, "file_name": f"/moved/{record['file_name']}"} for record in RECORDS]
    options = {"total_batch_size": 4, "aspect_ratio_grouping": False}
    TrainLoader(others, mapper, **options).load_state_dict(first.state_dict())
    with pytest.raises(DatasetError, match="training data are not those"):
        TrainLoader(others[::-1], mapper, **options).load_state_dict(first.state_dict())


def test_labels_tell_records_from_others():
    labelled, other = ([{**record, "label": label} for record in RECORDS] for label in (0, 1))
    options = {"total_batch_size": 4, "aspect_ratio_grouping": False}
    state = TrainLoader(labelled, mapper, **options).state_dict()
    TrainLoader(labelled, mapper, **options).load_state_dict(state)
    for records in (other, RECORDS):
        with pytest.raises(DatasetError, match="training data are not those"):
            TrainLoader(records, mapper, **options).load_state_dict(state)


@pytest.mark.parametrize("grouping", [False, True])
def test_any_position_of_a_long_run_is_reached(grouping):
    options = {"batch_size": 2, "aspect_ratio_grouping": grouping}
    unbroken = take(make(**options), 60)
    for position in (0, 1, 4, 5, 37):
        loader = make(**options)
        loader.load_state_dict({**loader.state_dict(), "images": 2 * position})
        assert take(loader, 3) == unbroken[position : position + 3]


def where_it_was_collated(samples):
    return {"ids": torch.tensor([sample["image_id"] for sample in samples]), "process": os.getpid()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_collated_where_they_are_read(num_workers):
    loader = make(picky, num_workers=num_workers, max_unreadable=1, collate=where_it_was_collated)
    batches = take(loader, 6)
    assert {batch["process"] == os.getpid() for batch in batches} == {num_workers == 0}
    expected = [[x["image_id"] for x in batch] for batch in take(make(picky, max_unreadable=1), 6)]
    assert [batch["ids"].tolist() for batch in batches] == expected
    assert loader.state_dict()["unreadable"] == ["7.png"]


def test_another_batch_size_goes_on_with_the_next_images():
    whole = [x for batch in take(make(), 10) for x in batch]
    first = make()
    take(first, 3)
    second = make(batch_size=2)
    second.load_state_dict(first.state_dict())
    assert [x for batch in take(second, 4) for x in batch] == whole[12:20]


def test_processes_and_parts_share_one_batch(monkeypatch):
    whole = take(make(batch_size=8), 3)
    monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loader_module.comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(make(batch_size=8, parts=2), 6))
    for number, batch in enumerate(whole):
        parts = [share[2 * number + part] for share in shares for part in range(2)]
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert list(itertools.chain(*parts)) == batch


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="multiple of .* 3, got 4"):
        make(parts=3)


def test_no_records_are_refused():
    with pytest.raises(DatasetError, match="no training data"):
        TrainLoader([], mapper, total_batch_size=4)


def test_grouped_batches_have_one_orientation():
    for batch in take(make(aspect_ratio_grouping=True, batch_size=2), 20):
        assert len({x["width"] > x["height"] for x in batch}) == 1


def picky(record):
    if record["image_id"] == 7:
        raise ImageError("image 7.png is truncated", "7.png")
    return mapper(record) if record["image_id"] % 2 else None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_others_stand_in_for_dropped_records(num_workers):
    loader = make(picky, num_workers=num_workers, max_unreadable=1)
    batches = take(loader, 10)
    assert loader.state_dict()["unreadable"] == ["7.png"]
    assert [len(batch) for batch in batches] == [4] * 10
    assert {x["image_id"] for batch in batches for x in batch} == {1, 3, 5, 9}
    assert batches == take(make(picky, max_unreadable=1), 10)
    with pytest.raises(ImageError, match="7.png"):
        take(make(picky, num_workers=num_workers), 10)


@pytest.mark.parametrize("sampler", [TrainingSampler, RepeatFactorTrainingSampler])
def test_order_is_that_of_detectron2(sampler):
    annotations = [[{"category_id": int(i > 7), "bbox": [0, 0, 1, 1]}] for i in range(10)]
    records = [
        {**record, "annotations": part} for record, part in zip(RECORDS, annotations, strict=True)
    ]
    if sampler is TrainingSampler:
        expected = sampler(10, seed=5)
    else:
        factors = sampler.repeat_factors_from_category_frequency(records, 0.7)
        assert factors.max() > 1.5
        expected = sampler(factors, seed=5)
    loader = detection_train_loader(
        records, mapper, total_batch_size=2, seed=5, sampler=sampler.__name__,
        repeat_threshold=0.7, aspect_ratio_grouping=False,
    )  # fmt: skip
    ids = [x["image_id"] for batch in take(loader, 40) for x in batch]
    assert ids == list(itertools.islice(expected, 80))


def test_unknown_sampler_is_refused():
    message = "sampler .DATALOADER.SAMPLER_TRAIN. must be TrainingSampler or Repeat.*, got Sampler"
    with pytest.raises(ValueError, match=message):
        make(sampler="Sampler")


def test_data_in_which_no_image_is_left(request):
    """detectron2 asserts it, when the run has begun already."""
    cfg = default_config()
    cfg.DATASETS.TRAIN = (request.node.name,)
    empty = [{**record, "annotations": []} for record in RECORDS]
    DatasetCatalog.register(request.node.name, lambda: empty)
    MetadataCatalog.get(request.node.name).thing_classes = ["a"]
    with pytest.raises(DatasetError, match="DATASETS.TRAIN cannot be used for training: No valid"):
        build_train_loader(cfg, 0)
