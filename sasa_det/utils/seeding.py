"""Random numbers that follow from a key, such as a run's seed and the number of an iteration."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch on all devices with a key of non-negative integers.

    Keys of two integers, as of samples, and of four, as of steps, never give the same numbers if
    the first one, the seed, is the same.
    """
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
    """Seed the two and return 64 bits for torch.

    NumPy writes numbers as words of 32 bits and fills up to four of them with zeros, so that
    (seed, 1) of a sample and (seed, 1, 0, 0) of a step would be the same. Where zeros or numbers of
    several words hide the length, it is written behind them. All other keys stay as they are, for
    the runs that go on from earlier checkpoints.
    """
    if (len(key) > 2 and not any(key[2:])) or any(number >= 2**32 for number in key[1:]):
        key = (*key, 0, len(key))
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    return int(words[2]) << 32 | int(words[3])
