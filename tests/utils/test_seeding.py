"""Random numbers of a key: those of samples and of steps are apart, and stay what they were."""

import random

import numpy as np
import pytest
import torch

from sasa_det.utils.seeding import seed_everything, seeded


def draw():
    return random.getrandbits(32), int(np.random.randint(2**31)), int(torch.randint(2**40, ()))


def drawn(key):
    with seeded(*key):
        return draw()


def test_blocks_draw_what_seeding_everything_gives_and_restore_the_generators():
    seed_everything(1, 2)
    first = draw()
    seed_everything(1, 2)
    assert drawn((1, 2)) == first == draw()
    assert all(one != other for one, other in zip(drawn((1, 3)), first, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**32, 2**40 + 5, 2**64, 2**96 + 7, 2**128])
def test_samples_and_steps_never_draw_the_same(seed):
    sizes = (0, 1, 2, 3, 4, 1000, 2**32 - 1)
    positions = [*sizes, *(2**32 * high + low for high in (1, 2, 4, 1000) for low in sizes)]
    keys = [(seed, position) for position in positions]
    # The second number of a step's key is 1, the others are its iteration and the process' rank.
    keys += [(seed, 1, iteration, rank) for iteration in sizes for rank in sizes]
    words = [drawn(key) for key in keys]
    assert len(set(words)) == len(keys) == 7 + 28 + 49


# Recorded before the first iteration's numbers were set apart from those of a sample: a run that
# goes on from a checkpoint of that time ends with the same bits.
RECORDED = {
    (3, 0): (2759803627, 1073805301, 470907928627),
    (3, 1): (1461817032, 1112806285, 960764760078),
    (3, 7): (1775149558, 438542562, 225512711109),
    (2**32 - 1, 123456789): (2209498842, 1357601526, 118386271991),
    (2**40 + 5, 9): (1320500656, 800868279, 45634703320),
    (3, 1, 0, 1): (1599411296, 459261905, 567379675642),
    (3, 1, 1, 0): (571413261, 1235670181, 775768661801),
    (3, 1, 5, 2): (3134043269, 430070098, 703261444735),
    (2**40 + 5, 1, 7, 0): (3963524144, 1380841127, 513742344324),
    (0,): (4094672861, 1761177647, 900834210369),
}


@pytest.mark.parametrize("key", RECORDED)
def test_numbers_stay_what_they_were(key):
    assert drawn(key) == RECORDED[key]
