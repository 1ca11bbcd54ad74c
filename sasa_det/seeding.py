"""Random numbers that follow from a key, such as a run's seed and the number of an iteration."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seed_everything", "seeded"]


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch on all devices with a key of non-negative integers."""
    torch.manual_seed(_seed_python_and_numpy(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch's CPU generator in a block, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.default_generator.manual_seed(_seed_python_and_numpy(key))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_python_and_numpy(key: tuple[int, ...]) -> int:
    """Seed the two and return 64 bits for torch."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    return int(words[2]) << 32 | int(words[3])
