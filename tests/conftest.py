from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _from_the_repository_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
