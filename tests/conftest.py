import os
from pathlib import Path

# PyTorch reads it when it is imported. Tests run processes side by side, and threads that wait for
# a core which another process uses make everything take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads it when it is imported; only a backend asked for by name is interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _from_the_repository_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture
def unregister():
    """A list of names that are registered as data sets until the end of the test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    names = []
    yield names
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)
