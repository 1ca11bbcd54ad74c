"""Blocks in which no garbage is looked for."""

import gc

import pytest

from sasa_det.utils.garbage import no_garbage_collection


def test_it_is_as_before_after_the_block():
    with pytest.raises(ZeroDivisionError), no_garbage_collection():
        assert not gc.isenabled()
        1 / 0  # noqa: B018
    assert gc.isenabled()
    gc.disable()
    try:
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class Knot:
    def __init__(self, ends):
        self.ends, self.knot = ends, self

    def __del__(self):
        self.ends.append(True)


def test_what_becomes_garbage_later_is_still_found():
    ends = []
    with no_garbage_collection():
        knot = Knot(ends)
    frozen = gc.get_freeze_count()
    del knot
    gc.collect()
    assert ends == [True] and frozen == gc.get_freeze_count()
