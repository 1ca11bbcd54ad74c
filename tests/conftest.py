import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported; only a backend asked for by name is interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _from_the_repository_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
