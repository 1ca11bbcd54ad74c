import os

import pytest
import torch


class _Command:
    """Runs a command in whoever unpickles it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def marker(tmp_path_factory):
    """A file that a hostile checkpoint writes where it is executed."""
    return tmp_path_factory.mktemp("marker") / "executed"


@pytest.fixture
def hostile(marker):
    """What writes the marker where it is unpickled."""
    yield _Command(f"touch {marker}")
    assert not marker.exists()


@pytest.fixture
def state():
    """A training state with all that one may hold."""
    torch.manual_seed(0)
    model = {"backbone.weight": torch.randn(3, 4), "head.bias": torch.randn(5).half()}
    return {
        "model": model,
        "trainer": {
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.1, "foreach": None},
            "random": (3, [2**31, 1], "MT19937"),
            "done": True,
        },
        "iteration": 7,
        "config": "SOLVER: ä\n",
    }


@pytest.fixture
def assert_same():
    return _assert_same


def _assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(_bytes(a), _bytes(b))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


def _bytes(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8)
