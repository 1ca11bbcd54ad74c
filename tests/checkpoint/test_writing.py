import os
import resource
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch

from sasa_det.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from sasa_det.checkpoint.writing import _measure


def test_the_same_data_gives_the_same_bytes(tmp_path, state):
    write_checkpoint(state, tmp_path / "a.pth")
    write_checkpoint(state, tmp_path / "another.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_what_a_failing_disk_leaves(tmp_path, state, assert_same):
    path = tmp_path / "a.pth"
    write_checkpoint(state, path)
    larger = {**state, "model": {"weight": torch.ones(10**6)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, 10_000, 3_999_000, 4_000_900):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                CheckpointError, match="a.pth could not be written .*File too large"
            ):
                write_checkpoint(larger, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == ["a.pth"]
        assert_same(read_checkpoint(path), state)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, state, assert_same):
    path = tmp_path / "run" / "a.pth"
    write_checkpoint(state, path)
    # As large as what is free, in a file that takes nothing.
    size = shutil.disk_usage(tmp_path).free // 4
    weight = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size)
    with pytest.raises(CheckpointError, match=r"a.pth needs \d+ MiB but the disk has \d+ MiB left"):
        write_checkpoint({**state, "model": {"weight": weight}}, path)
    assert os.listdir(tmp_path / "run") == ["a.pth"]
    assert_same(read_checkpoint(path), state)


def test_the_estimate_is_never_below_the_size(tmp_path, state):
    shared = torch.ones(1000)
    states = [
        {},
        state,
        {str(n): torch.ones(1) for n in range(1000)},
        {"a": shared, "b": shared, "c": shared[3:5]},
        {"numbers": [1.5, 2**62, True, None] * 1000, "text": "ä" * 1000},
    ]
    for data in states:
        write_checkpoint(data, tmp_path / "a.pth")
        # Files have about a kilobyte of their own, which the margin covers.
        assert (tmp_path / "a.pth").stat().st_size < _measure(data) + 2000
    assert _measure(states[3]) < 8000  # storages count once


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (defaultdict(list), "collections.defaultdict"),
        (b"", "builtins.bytes"),
        ({1, 2}, "builtins.set"),
        (print, "builtin_function_or_method"),
        (torch.eye(2).to_sparse(), "torch.Tensor"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, value, name):
    with pytest.raises(CheckpointError, match=rf"cannot hold data\['a'\]\[1\], a .*{name}"):
        write_checkpoint({"a": [1, value]}, tmp_path / "a.pth")
    assert not any(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"a key of data\['a'\], a builtins.bytes"):
        write_checkpoint({"a": {b"x": 1}}, tmp_path / "a.pth")


def test_all_types_that_are_written_are_read_again(tmp_path, assert_same):
    data = {
        "model": {"a": torch.nn.Parameter(torch.ones(2))},
        "rest": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), (), [], {}, "", -(2**70)],
        "keys": {0: 1, 1.5: 2, None: 3, True: 4},
    }
    write_checkpoint(data, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert_same({**read, "model": None}, {**data, "model": None})
    assert torch.equal(read["model"]["a"], data["model"]["a"])
